"""The agent against a coordinator over real gRPC: who it is, whom it comes back to, its spare, its end."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys

import psutil
import pytest

from edge_node.agent import Agent, AgentConfig
from edge_node.state_dir import StateDir
from plutino.errors import AgentError, ConfigError, SecurityError
from tests.integration.agent_coordinator import (
    FAKE_WORKER,
    MIB,
    WAIT_S,
    FakeCoordinator,
    attached,
    children,
    pool_config,
    run,
    worker,
)

ASKED = {"config_json": "{}", "threads": 2}


def test_agent_hello_comes_after_ready_and_carries_what_the_worker_measured(tmp_path):
    async def test():
        coordinator = FakeCoordinator()
        async with attached(coordinator, tmp_path):
            hello = coordinator.hellos[0]

        assert coordinator.events[0].HasField("hello")
        assert (hello.name, hello.threads, hello.baseline_bytes) == ("pi-3", 2, 20 * MIB)
        assert (list(hello.dtypes), dict(hello.versions), list(hello.workers)) == (["fp32"], {"torch": "0"}, [])

    run(test())


def test_agent_keeps_its_identity_over_restarts(tmp_path):
    async def test():
        coordinator = FakeCoordinator()
        for _ in range(2):
            async with attached(coordinator, tmp_path):
                pass

        first, second = coordinator.hellos
        assert first.agent_id == second.agent_id != ""
        assert first.host_id == second.host_id != ""

    run(test())


def test_agent_coordinator_restart_keeps_workers_and_reports_them(tmp_path):
    async def test():
        coordinator = FakeCoordinator()
        async with attached(coordinator, tmp_path):
            coordinator.start_worker(stage=2)
            started = await coordinator.event("worker_started")
            await coordinator.server.stop(0)
            await coordinator.start()
            await coordinator.until(lambda: len(coordinator.hellos) == 2)

            assert list(coordinator.hellos[1].workers) == [worker(2)]
            assert psutil.pid_exists(started.pid)

    run(test())


def test_agent_that_ends_says_goodbye_before_its_workers_end_and_begins_nothing_more(tmp_path):
    async def test():
        coordinator = FakeCoordinator()
        async with attached(coordinator, tmp_path) as agent:
            coordinator.start_worker()
            started = await coordinator.event("worker_started")
            agent.end()
            leaving = await coordinator.event("leaving")
            coordinator.start_worker(stage=1)
            coordinator.profile({})

        said = [event.WhichOneof("event") for event in coordinator.events]
        assert leaving.reason == "its agent was ended"
        assert said.index("leaving") < said.index("worker_exited")
        assert (said.count("worker_started"), said.count("profile_result")) == (1, 0)
        assert not psutil.pid_exists(started.pid)

    run(test())


def test_agent_exit_while_the_coordinator_is_away_is_reported_later(tmp_path):
    async def test():
        coordinator = FakeCoordinator()
        async with attached(coordinator, tmp_path):
            coordinator.start_worker()
            started = await coordinator.event("worker_started")
            await coordinator.server.stop(0)
            os.kill(started.pid, signal.SIGKILL)
            await coordinator.start()
            exited = await coordinator.event("worker_exited")

        assert exited.worker == worker(0)

    run(test())


def test_agent_heartbeat_carries_usage_of_jobs_workers_only(tmp_path):
    async def test():
        coordinator = FakeCoordinator()
        async with attached(coordinator, tmp_path):
            coordinator.start_worker()
            heartbeat = await coordinator.heartbeat(lambda heartbeat: heartbeat.workers)

        (usage,) = heartbeat.workers
        assert usage.worker == worker(0)
        assert usage.peak_rss_bytes >= usage.rss_bytes > MIB
        assert heartbeat.agent_rss_bytes > MIB

    run(test())


def test_agent_spare_comes_back_where_the_budget_has_room_and_yields_to_the_job(tmp_path):
    async def test():
        coordinator = FakeCoordinator()
        async with attached(coordinator, tmp_path):
            coordinator.start_worker()
            started = await coordinator.event("worker_started")
            await coordinator.heartbeat(lambda _: len(children()) == 2)

            (spare,) = set(children()) - {started.pid}
            yields = {pid: "--yields" in psutil.Process(pid).cmdline() for pid in (started.pid, spare)}
            assert yields == {started.pid: False, spare: True}

    run(test())


def test_agent_without_room_for_a_spare_answers_a_profile_with_the_reason(tmp_path):
    async def test():
        coordinator = FakeCoordinator()
        async with attached(coordinator, tmp_path, pool_config(memory_budget_bytes=110 * MIB)):
            coordinator.start_worker()
            coordinator.profile({})
            result = await coordinator.event("profile_result")

            assert "100 MiB of 110 MiB" in result.error
            assert len(children()) == 1

    run(test())


def test_agent_profile_is_measured_by_the_spare(tmp_path):
    async def test():
        coordinator = FakeCoordinator()
        async with attached(coordinator, tmp_path):
            coordinator.profile({"threads": 2})
            result = await coordinator.event("profile_result")

        assert result.request_id == "p1"
        assert json.loads(result.timings_json) == {"asked": {"threads": 2}}

    run(test())


def test_agent_profile_is_kept_over_restarts_unless_a_fresh_one_is_asked_for(tmp_path):
    async def test():
        coordinator = FakeCoordinator()
        for number, request in enumerate((ASKED, ASKED, {**ASKED, "is_fresh": True})):
            async with attached(coordinator, tmp_path):
                coordinator.profile(request, f"p{number}")
                await coordinator.event("profile_result", number=number)

        results = [event.profile_result for event in coordinator.events if event.HasField("profile_result")]
        assert [(result.request_id, result.is_kept) for result in results] == [
            ("p0", False),
            ("p1", True),
            ("p2", False),
        ]
        assert results[1].timings_json == results[0].timings_json

    run(test())


def test_agent_profile_beside_a_jobs_worker_is_not_kept(tmp_path):
    async def test():
        coordinator = FakeCoordinator()
        async with attached(coordinator, tmp_path):
            coordinator.start_worker()
            await coordinator.event("worker_started")
            for number in range(2):
                coordinator.profile(ASKED, f"p{number}")
                result = await coordinator.event("profile_result", number=number)
                assert not result.is_kept

    run(test())


def test_agent_that_is_asked_what_it_has_kept_measures_nothing(tmp_path):
    async def test():
        coordinator = FakeCoordinator()
        async with attached(coordinator, tmp_path):
            for number, only_kept in enumerate((True, False, True)):
                coordinator.profile(ASKED, f"p{number}", only_kept=only_kept)
                await coordinator.event("profile_result", number=number)

        results = [event.profile_result for event in coordinator.events if event.HasField("profile_result")]
        assert [(bool(one.timings_json), one.is_kept) for one in results] == [
            (False, False),
            (True, False),
            (True, True),
        ]
        assert not any(one.error for one in results)

    run(test())


def test_agent_profile_beside_others_goes_on_when_told_and_is_kept_only_if_all_were_there(tmp_path):
    async def test():
        coordinator = FakeCoordinator()
        beside = {**ASKED, "beside": [1, 2]}
        async with attached(coordinator, tmp_path):
            for number, is_whole in enumerate((False, True)):
                coordinator.profile(beside, f"p{number}")
                reached = await coordinator.event("profile_reached", number=number)
                assert (reached.request_id, reached.milestone) == (f"p{number}", 0)
                coordinator.let_profile_go_on(reached, is_whole=is_whole)
                result = await coordinator.event("profile_result", number=number)
                assert (result.is_kept, result.lacked_company) == (False, not is_whole)
            # Kept is what was measured with all of them, and it is no answer for a device alone.
            coordinator.profile(beside, "p2", only_kept=True)
            coordinator.profile(ASKED, "p3", only_kept=True)
            kept, alone = [await coordinator.event("profile_result", number=number) for number in (2, 3)]
            assert (kept.is_kept, bool(alone.timings_json)) == (True, False)

    run(test())


def test_agent_profile_that_kills_the_spare_is_answered_with_an_error(tmp_path):
    async def test():
        coordinator = FakeCoordinator()
        async with attached(coordinator, tmp_path):
            coordinator.profile({"die": True})
            result = await coordinator.event("profile_result")

        assert "SIGABRT" in result.error

    run(test())


def test_agent_whose_worker_cannot_import_ends_with_the_tail_of_its_log(tmp_path):
    async def test():
        agent = Agent(
            AgentConfig(coordinator_address="127.0.0.1:1", name="n", pool=pool_config("--start", "import-error")),
            StateDir(tmp_path),
        )
        with pytest.raises(AgentError, match=r"(?s)worker-1\.log.*No module named 'torch'"):
            await agent.run()

    run(test())


def test_agent_whose_worker_breaks_the_protocol_says_so(tmp_path):
    async def test():
        pool = pool_config("--start", "babble")
        agent = Agent(AgentConfig(coordinator_address="127.0.0.1:1", name="n", pool=pool), StateDir(tmp_path))
        with pytest.raises(AgentError, match="malformed event"):
            await agent.run()

    run(test())


def test_agent_with_less_memory_than_a_baseline_is_refused(tmp_path):
    async def test():
        pool = pool_config("--baseline-bytes", str(400 * MIB), memory_budget_bytes=300 * MIB)
        agent = Agent(AgentConfig(coordinator_address="127.0.0.1:1", name="n", pool=pool), StateDir(tmp_path))
        with pytest.raises(ConfigError, match="400 MiB before any job, the device offers 300 MiB"):
            await agent.run()

    run(test())
    assert children() == []


def test_agent_that_is_shut_out_ends_its_workers_and_itself(tmp_path):
    async def test():
        coordinator = FakeCoordinator()
        await coordinator.start()
        agent = Agent(
            AgentConfig(coordinator_address=coordinator.address, name="pi-3", pool=pool_config()), StateDir(tmp_path)
        )
        running = asyncio.create_task(agent.run())
        await coordinator.until(lambda: coordinator.hellos)
        coordinator.start_worker()
        await coordinator.event("worker_started")
        coordinator.shuts_out = True
        await coordinator.server.stop(0)
        await coordinator.start()

        with pytest.raises(SecurityError, match="revoked"):
            await asyncio.wait_for(running, WAIT_S)
        await coordinator.server.stop(0)
        assert children() == []

    run(test())


def test_second_agent_of_a_state_dir_is_refused(tmp_path):
    async def test():
        coordinator = FakeCoordinator()
        async with attached(coordinator, tmp_path):
            config = AgentConfig(coordinator_address=coordinator.address, name="n", pool=pool_config())
            with pytest.raises(ConfigError, match=f"process {os.getpid()}"):
                await Agent(config, StateDir(tmp_path)).run()

    run(test())


def test_agent_killed_leaves_no_worker_and_no_lock(tmp_path):
    program = f"""
import sys
from pathlib import Path
sys.path.insert(0, {str(FAKE_WORKER.parents[2])!r})
from edge_node.agent import AgentConfig, run_agent
from edge_node.state_dir import StateDir
from edge_node.pool_config import PoolConfig
pool = PoolConfig(memory_budget_bytes=2**30, threads=1, worker_command=(sys.executable, "-S", {str(FAKE_WORKER)!r}))
run_agent(AgentConfig(coordinator_address=sys.argv[1], name="n", pool=pool), StateDir(Path({str(tmp_path)!r})))
"""

    async def test():
        coordinator = FakeCoordinator()
        await coordinator.start()
        agent = subprocess.Popen([sys.executable, "-c", program, coordinator.address])
        try:
            await coordinator.until(lambda: coordinator.hellos)
            workers = psutil.Process(agent.pid).children()
        finally:
            agent.kill()
            agent.wait(WAIT_S)
            await coordinator.server.stop(0)
        gone, alive = psutil.wait_procs(workers, WAIT_S)

        assert (len(gone), alive) == (1, [])
        with StateDir(tmp_path).locked():
            pass

    run(test())
