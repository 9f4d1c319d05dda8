"""The agent and its workers: started, stopped, killed, held, and kept within memory."""

from __future__ import annotations

import asyncio
import os
import signal

import psutil
import pytest

from tests.integration.agent_coordinator import (
    MIB,
    FakeCoordinator,
    attached,
    children,
    pool_config,
    run,
    worker,
)

HELD = {"act": "hold", "stage_key": "blocks 0-3", "keeps_stage_s": 60.0}


def test_agent_start_takes_the_spare_and_stop_reports_the_exit(tmp_path):
    async def test():
        coordinator = FakeCoordinator()
        async with attached(coordinator, tmp_path):
            spare = children()
            coordinator.start_worker()
            started = await coordinator.event("worker_started")
            coordinator.stop_worker()
            exited = await coordinator.event("worker_exited")

        assert spare == [started.pid]
        assert exited.worker == worker(0)
        assert (exited.exit_code, exited.reason) == (-signal.SIGTERM, "stopped: cancelled by a person")

    run(test())


def test_agent_start_of_a_running_worker_leaves_it_alone(tmp_path):
    async def test():
        coordinator = FakeCoordinator()
        async with attached(coordinator, tmp_path):
            coordinator.start_worker()
            coordinator.start_worker()
            first = await coordinator.event("worker_started", number=0)
            second = await coordinator.event("worker_started", number=1)

        assert first.pid == second.pid

    run(test())


def test_agent_stop_of_a_worker_that_is_gone_reports_it_exited(tmp_path):
    async def test():
        coordinator = FakeCoordinator()
        async with attached(coordinator, tmp_path):
            coordinator.stop_worker(stage=3)
            exited = await coordinator.event("worker_exited")

        assert exited.worker == worker(3)
        assert "was not running" in exited.reason

    run(test())


def test_agent_stop_of_a_worker_deaf_to_sigterm_kills_it(tmp_path):
    async def test():
        coordinator = FakeCoordinator()
        async with attached(coordinator, tmp_path, pool_config(stop_grace_s=0.05)):
            coordinator.start_worker(act="ignore-sigterm")
            await coordinator.event("worker_started")
            log = tmp_path / "logs" / "worker-1.log"
            await coordinator.heartbeat(lambda _: "ignoring" in log.read_text())
            coordinator.stop_worker()
            exited = await coordinator.event("worker_exited")

        assert exited.exit_code == -signal.SIGKILL
        assert exited.reason == "stopped: cancelled by a person"

    run(test())


def test_agent_newer_plan_epoch_ends_the_older_worker_first(tmp_path):
    async def test():
        coordinator = FakeCoordinator()
        async with attached(coordinator, tmp_path, pool_config(memory_budget_bytes=150 * MIB)):
            coordinator.start_worker(epoch=1)
            coordinator.start_worker(epoch=2)
            exited = await coordinator.event("worker_exited")
            started = await coordinator.event("worker_started", number=1)
            coordinator.start_worker(epoch=1)
            stale = await coordinator.event("worker_exited", number=1)

        assert (exited.worker.plan_epoch, started.worker.plan_epoch) == (1, 2)
        assert stale.worker.plan_epoch == 1
        assert "older plan" in stale.reason

    run(test())


def test_agent_worker_killed_from_outside_is_reported_with_its_signal(tmp_path):
    async def test():
        coordinator = FakeCoordinator()
        async with attached(coordinator, tmp_path):
            coordinator.start_worker()
            started = await coordinator.event("worker_started")
            os.kill(started.pid, signal.SIGKILL)
            exited = await coordinator.event("worker_exited")

        assert exited.exit_code == -signal.SIGKILL
        assert "SIGKILL" in exited.reason
        assert "worker-1.log" in exited.reason

    run(test())


@pytest.mark.parametrize(
    ("act", "exit_code", "reason"),
    [
        ({"act": "exit", "exit_code": 7}, 7, "exit code 7"),
        ({"act": "fail"}, 3, "ModelError: 2 of 3 tensors missing"),
    ],
)
def test_agent_worker_that_ends_itself_is_reported_with_its_own_words(tmp_path, act, exit_code, reason):
    async def test():
        coordinator = FakeCoordinator()
        async with attached(coordinator, tmp_path):
            coordinator.start_worker(**act)
            exited = await coordinator.event("worker_exited")

        assert exited.exit_code == exit_code
        assert reason in exited.reason

    run(test())


def test_agent_worker_above_its_budget_is_killed_with_the_numbers(tmp_path):
    async def test():
        coordinator = FakeCoordinator()
        async with attached(coordinator, tmp_path):
            coordinator.start_worker(budget_bytes=64 * MIB, act="eat", bytes=100 * MIB)
            exited = await coordinator.event("worker_exited")

        assert exited.out_of_memory
        assert exited.exit_code == -signal.SIGKILL
        assert "its memory budget is 64 MiB" in exited.reason

    run(test())


def test_agent_start_beyond_the_devices_memory_is_refused_with_the_numbers(tmp_path):
    async def test():
        coordinator = FakeCoordinator()
        async with attached(coordinator, tmp_path, pool_config(memory_budget_bytes=150 * MIB)):
            coordinator.start_worker(stage=0)
            coordinator.start_worker(stage=1)
            exited = await coordinator.event("worker_exited", stage=1)

        assert "1 running workers take 100 MiB of the device's 150 MiB" in exited.reason

    run(test())


def test_agent_gives_the_next_job_of_a_held_stage_to_the_worker_that_holds_it(tmp_path):
    async def test():
        coordinator = FakeCoordinator()
        async with attached(coordinator, tmp_path):
            coordinator.start_worker(**HELD)
            first = await coordinator.event("worker_started")
            exited = await coordinator.event("worker_exited")
            # With both budgets the device would be over its own: the holder's must not count twice.
            coordinator.start_worker(stage=1, budget_bytes=350 * MIB, **HELD)
            second = await coordinator.event("worker_started", stage=1)

        assert (exited.exit_code, exited.worker) == (0, worker(0)) and "holds its stage for 60 s" in exited.reason
        assert second.pid == first.pid

    run(test())


def test_agent_ends_a_held_stage_whose_memory_another_job_needs(tmp_path):
    async def test():
        coordinator = FakeCoordinator()
        async with attached(coordinator, tmp_path):
            coordinator.start_worker(**HELD)
            first = await coordinator.event("worker_started")
            await coordinator.event("worker_exited")
            coordinator.start_worker(stage=1, budget_bytes=350 * MIB, stage_key="blocks 3-6")
            second = await coordinator.event("worker_started", stage=1)
            assert not psutil.pid_exists(first.pid)

        assert second.pid != first.pid

    run(test())


@pytest.mark.parametrize(("headroom_bytes", "is_kept"), [(5 * MIB, True), (5 * MIB - 1, False)])
def test_agent_gives_a_process_that_goes_on_its_part_in_the_jobs_next_plan_where_what_is_left_has_room(
    tmp_path, headroom_bytes, is_kept
):
    async def test():
        coordinator = FakeCoordinator()
        async with attached(coordinator, tmp_path):
            coordinator.start_worker(epoch=1, act="go-on", left_bytes=5 * MIB)
            first = await coordinator.event("worker_started")
            exited = await coordinator.event("worker_exited")
            # The budget of the part before is no longer promised to anybody.
            coordinator.start_worker(epoch=2, stage=3, budget_bytes=350 * MIB, headroom_bytes=headroom_bytes)
            second = await coordinator.event("worker_started", stage=3)

        assert (exited.exit_code, exited.worker) == (0, worker(0, epoch=1)) and "next plan" in exited.reason
        assert (second.pid == first.pid) is is_kept

    run(test())


def test_agent_starts_another_process_where_the_one_that_goes_on_was_killed(tmp_path):
    async def test():
        coordinator = FakeCoordinator()
        async with attached(coordinator, tmp_path):
            coordinator.start_worker(epoch=1, act="go-on", left_bytes=0)
            first = await coordinator.event("worker_started")
            await coordinator.event("worker_exited")
            os.kill(first.pid, signal.SIGKILL)
            while psutil.pid_exists(first.pid):  # within the bound of run()
                await asyncio.sleep(0.02)
            coordinator.start_worker(epoch=2)
            second = await coordinator.event("worker_started", number=1)

        assert second.pid != first.pid

    run(test())


def test_agent_ends_a_process_that_goes_on_where_another_job_needs_its_memory(tmp_path):
    async def test():
        coordinator = FakeCoordinator()
        async with attached(coordinator, tmp_path):
            coordinator.start_worker(act="go-on", left_bytes=0)
            first = await coordinator.event("worker_started")
            await coordinator.event("worker_exited")
            coordinator.start_worker(job_id="another", budget_bytes=350 * MIB)
            second = await coordinator.event("worker_started", number=1)
            assert not psutil.pid_exists(first.pid)

        assert second.pid != first.pid

    run(test())


def test_agent_ends_a_held_stage_when_its_time_is_over(tmp_path):
    async def test():
        coordinator = FakeCoordinator()
        async with attached(coordinator, tmp_path):
            coordinator.start_worker(**{**HELD, "keeps_stage_s": 0.0})
            first = await coordinator.event("worker_started")
            await coordinator.event("worker_exited")
            while psutil.pid_exists(first.pid):  # within the bound of run()
                await asyncio.sleep(0.02)

    run(test())
