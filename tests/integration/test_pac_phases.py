"""Jobs that leave the pipeline after the first epoch and train from the activation cache, over real gRPC."""

from __future__ import annotations

from contextlib import contextmanager

import pytest

from edge_node.weights_config import WeightsConfig
from plutino.assets import SNIPS_DIR, TINY_LLAMA_DIR
from tests.integration.stack import (
    People,
    ProcessCoordinator,
    ThreadAgent,
    ThreadCoordinator,
    losses,
    make_spec,
    wait_until,
)

NUM_ROWS = 12


def spec_of(output, num_stages, *, activation_cache="raw", cached_epochs="data-parallel", **training):
    return make_spec(
        TINY_LLAMA_DIR,
        SNIPS_DIR / "train.jsonl",
        output,
        data={"train": str(SNIPS_DIR / "train.jsonl"), "limit": NUM_ROWS},
        training={
            "epochs": 3,
            "batch_size": 6,
            "micro_batch_size": 2,
            "lr": 2e-3,
            "activation_cache": activation_cache,
            **training,
        },
        placement={"stages": num_stages, "cached_epochs": cached_epochs, "replicas": "never"},
        method={"type": "parallel_adapters", "reduction": 4},
    )


def agents_of(address, folder, num_devices, num_bytes=1 << 30, *, is_shared=False):
    """Each with folders of its own, or all with the same ones, as agents of one machine have them."""
    found = []
    for index in range(num_devices):
        own = folder / ("machine" if is_shared else f"device{index}")
        found.append(ThreadAgent(address, f"device{index}", weights=weights_of(own, num_bytes)))
    return found


def weights_of(folder, num_bytes=1 << 30):
    """Where a device keeps weights and activations, and how many bytes of these."""
    return WeightsConfig(
        cache_dir=folder / "weights",
        cache_bytes=1 << 30,
        activation_dir=folder / "activations",
        activation_bytes=num_bytes,
    )


@contextmanager
def fleet(folder, num_devices, num_bytes=1 << 30, *, is_shared=False):
    """People and agents of a coordinator."""
    coordinator = ThreadCoordinator(folder / "state")
    people = People(coordinator.endpoints.people_address)
    agents = agents_of(coordinator.endpoints.devices_address, folder, num_devices, num_bytes, is_shared=is_shared)
    try:
        wait_until(lambda: len(people.devices()) == num_devices, "all agents attached")
        yield people, agents
    finally:
        for agent in agents:
            agent.close()
        people.close()
        coordinator.close()


def finished(people, job_id, output):
    """Losses, adapter, steps at which the plan changed with the reasons."""
    assert people.wait(job_id).state == "succeeded", people.job(job_id)
    changes = [(event["step"], event["reason"]) for kind, event in people.events(job_id) if kind == "PlanChanges"]
    return losses(people.detail(job_id)), (output / "adapter_model.safetensors").read_bytes(), changes


def run(people, output, num_stages, **training):
    return finished(people, people.submit(spec_of(output, num_stages, **training)), output)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The job on one device that keeps nothing."""
    folder = tmp_path_factory.mktemp("undisturbed")
    with fleet(folder, 1, num_bytes=0) as (people, _):
        found = run(people, folder / "adapter", 1)
        assert not found[2]
        return found


@pytest.mark.parametrize(
    ("num_devices", "cached_epochs"),
    [
        pytest.param(1, "data-parallel", marks=pytest.mark.slow),
        (2, "data-parallel"),
        (2, "stages"),
        pytest.param(3, "data-parallel", marks=pytest.mark.slow),
        pytest.param(3, "stages", marks=pytest.mark.slow),
    ],
)
def test_job_trains_without_its_backbone_after_the_first_epoch_with_the_bits_of_an_uncached_one(
    tmp_path, undisturbed, num_devices, cached_epochs
):
    with fleet(tmp_path, num_devices) as (people, agents):
        job_id = people.submit(spec_of(tmp_path / "adapter", num_devices, cached_epochs=cached_epochs))
        found = finished(people, job_id, tmp_path / "adapter")
        assignments = [assignment for agent in agents for assignment in agent.assignments]
        moves = [event for kind, event in people.events(job_id) if kind == "Moved"]

    assert found[:2] == undisturbed[:2]
    assert [(move["step"], move["num_went_on"], move["num_workers"]) for move in moves] == [
        (2, num_devices, num_devices),
        (6, num_devices, num_devices),
    ]
    # Who trains all of it reads the others' parts from their devices; who has what it needs asks nobody.
    others = {f"device device{index}" for index in range(num_devices)} if num_devices > 1 else set()
    needs_others = cached_epochs == "data-parallel"
    assert [set(move["state_by_place"]) for move in moves] == [{"kept"} | (others if needs_others else set()), {"kept"}]
    assert [step for step, _ in found[2]] == [2, 6]
    assert "backbone leaves their memory" in found[2][0][1]
    assert "loaded again" in found[2][1][1]
    assert sorted((a.plan_epoch, a.from_cache) for a in assignments) == [
        *[(1, False)] * num_devices,
        *[(2, True)] * num_devices,
        *[(3, False)] * num_devices,
    ]


@pytest.mark.slow
def test_start_by_gradients_is_the_same_on_one_device_and_on_two_that_leave_their_pipeline(tmp_path):
    found = {}
    for num_devices in (1, 2):
        folder = tmp_path / str(num_devices)
        folder.mkdir()
        with fleet(folder, num_devices, num_bytes=1 << 30 if num_devices > 1 else 0) as (people, _):
            spec = spec_of(folder / "adapter", num_devices)
            method = spec.method.model_copy(update={"init": "fisher"})
            job_id = people.submit(spec.model_copy(update={"method": method}))
            found[num_devices] = finished(people, job_id, folder / "adapter")

    assert found[1][:2] == found[2][:2]
    assert [step for step, _ in found[2][2]] == [2, 6]


@pytest.mark.slow
def test_agents_of_one_machine_share_its_folder_and_leave_the_pipeline_all_the_same(tmp_path, undisturbed):
    with fleet(tmp_path, 2, is_shared=True) as (people, agents):
        found = run(people, tmp_path / "adapter", 2)
        phases = {a.plan_epoch: a.from_cache for agent in agents for a in agent.assignments}

    assert found[:2] == undisturbed[:2]
    assert phases == {1: False, 2: True, 3: False}


@pytest.mark.slow
def test_device_lost_while_it_trains_from_the_cache_brings_the_backbone_back_and_moves_no_bit(
    tmp_path, undisturbed, gate
):
    with fleet(tmp_path, 2) as (people, agents):
        gate.hold_at(3)
        job_id = people.submit(spec_of(tmp_path / "adapter", None))
        people.wait_for_step(job_id, 3)
        lost = next(agent for agent in agents if agent.name == "device1")
        ref = next(ref for ref in lost.sessions if ref.plan_epoch == 2)
        lost.lose_worker(ref)
        gate.open()
        found = finished(people, job_id, tmp_path / "adapter")
        phases = {a.plan_epoch: a.from_cache for agent in agents for a in agent.assignments}

    assert found[:2] == undisturbed[:2]
    assert phases[2] is True
    assert phases[3] is False


@pytest.mark.slow
def test_damaged_entry_is_computed_again_by_the_pipeline(tmp_path, undisturbed, gate):
    with fleet(tmp_path, 2) as (people, _):
        gate.hold_at(3)
        job_id = people.submit(spec_of(tmp_path / "adapter", 2))
        people.wait_for_step(job_id, 3)
        for path in (tmp_path / "device1" / "activations").glob("*/h1.data"):
            with path.open("r+b") as file:  # in place: its worker has it open
                file.write(b"damage")
        gate.open()
        found = finished(people, job_id, tmp_path / "adapter")
        reasons = [event["reason"] for kind, event in people.events(job_id) if kind == "Recovering"]

    assert found[:2] == undisturbed[:2]
    assert any("activation cache" in reason for reason in reasons)


@pytest.mark.slow
@pytest.mark.parametrize("crash_at", ["plan_reserved:2", "workers_started:3", "workers_linked:2", "plan_reserved:3"])
def test_coordinator_killed_at_a_change_of_phase_goes_on_without_a_bit_moved(tmp_path, undisturbed, crash_at):
    state_dir = tmp_path / "state"
    coordinators = [ProcessCoordinator(state_dir, crash_at=crash_at)]
    people, agents = None, []
    try:
        endpoints = coordinators[0].endpoints
        people = People(endpoints.people_address)
        agents = agents_of(endpoints.devices_address, tmp_path, 2)
        wait_until(lambda: len(people.devices()) == 2, "both agents attached")
        job_id = people.submit(spec_of(tmp_path / "adapter", 2))
        coordinators[0].wait_for_crash()
        people.close()
        coordinators.append(ProcessCoordinator(state_dir, settle_s=1.5))
        people = People(coordinators[1].endpoints.people_address)
        found = finished(people, job_id, tmp_path / "adapter")
    finally:
        for agent in agents:
            agent.close()
        if people is not None:
            people.close()
        for coordinator in coordinators:
            coordinator.close()

    assert found[:2] == undisturbed[:2]
