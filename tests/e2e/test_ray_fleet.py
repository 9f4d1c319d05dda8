"""``plutino up --fleet ray`` on a Ray cluster of three nodes: agents are placed by Ray, die with it and come back."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from plutino.assets import SNIPS_DIR, TINY_LLAMA_DIR
from plutino.sizes import MIB
from tests.e2e.stack import Stack, wait_until, write_job
from tests.ray_cluster import RayCluster

# A minute or two: a cluster, a coordinator and two agents with torch on one machine.
pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)]

WAIT_S = 240.0
LARGE, SMALL = {"num_cpus": 2, "memory_bytes": 1200 * MIB}, {"num_cpus": 1, "memory_bytes": 900 * MIB}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayCluster]:
    cluster = RayCluster(tmp_path_factory.mktemp("cluster"))
    try:
        # The head gives no processors, as heads usually do not.
        cluster.add_node(num_cpus=0, memory_bytes=600 * MIB)
        yield cluster
    finally:
        cluster.close()


@pytest.fixture(scope="module")
def node_ids(cluster: RayCluster) -> list[str]:
    return [cluster.add_node(**LARGE), cluster.add_node(**SMALL)]


@pytest.fixture(scope="module")
def stack(cluster: RayCluster, node_ids: list[str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in cluster.environment.items():
            patch.setenv(name, value)
        stack = Stack(tmp_path_factory.mktemp("stack"))
        try:
            stack.up("--fleet", "ray", "--ray-address", cluster.address, "--lease", "30")
            wait_until(lambda: len(alive(stack)) == 2, WAIT_S)
            yield stack
        finally:
            stack.close()


def alive(stack: Stack) -> dict[str, dict[str, object]]:
    """Devices that are in, by the first letters of the id of the node they are on."""
    with stack.client() as client:
        return {device["name"][-8:]: device for device in client.devices() if device["state"] == "alive"}


def job(stack: Stack, name: str, *, steps: int, **placement: object) -> Path:
    return write_job(
        stack.folder / f"{name}.yaml",
        TINY_LLAMA_DIR,
        data={"train": str(SNIPS_DIR / "train.jsonl"), "limit": 64},
        training={"steps": steps, "batch_size": 8, "micro_batch_size": 4},
        placement=placement,
    )


def ended(stack: Stack, job_id: str) -> tuple[str, str]:
    """State and reason of a job once it has ended."""
    with stack.client() as client:
        wait_until(lambda: client.job(job_id).summary.state in ("succeeded", "failed", "cancelled"), WAIT_S)
        summary = client.job(job_id).summary
        return summary.state, summary.reason


def agents_below(process_id: int) -> list[psutil.Process]:
    return [
        child for child in psutil.Process(process_id).children(recursive=True) if "edge_node.cli" in child.cmdline()
    ]


def test_agents_are_placed_one_a_node_with_the_nodes_own_resources(stack: Stack, node_ids: list[str]) -> None:
    devices = alive(stack)

    assert set(devices) == {node_id[:8] for node_id in node_ids}
    large, small = (devices[node_id[:8]] for node_id in node_ids)
    assert (large["threads"], small["threads"]) == (2, 1)
    assert (large["memory_budget_bytes"], small["memory_budget_bytes"]) == (944 * MIB, 644 * MIB)


def test_demo_job_runs_on_agents_placed_by_ray(stack: Stack) -> None:
    job_id = stack.ask("submit", job(stack, "two-stages", steps=4, stages=2), "--detach")["job_id"]

    assert ended(stack, job_id) == ("succeeded", "")


def test_node_killed_under_a_job_is_survived_and_its_successor_gets_an_agent(
    stack: Stack, cluster: RayCluster, node_ids: list[str]
) -> None:
    job_id = stack.ask("submit", job(stack, "survivor", steps=60, stages=1), "--detach")["job_id"]
    with stack.client() as client:
        wait_until(lambda: client.job(job_id).summary.step >= 3, WAIT_S)

    cluster.kill_node(node_ids[0])
    outcome = ended(stack, job_id)
    left = set(alive(stack))
    successor = cluster.add_node(**LARGE)
    wait_until(lambda: successor[:8] in alive(stack), WAIT_S)

    assert outcome == ("succeeded", "")
    assert left == {node_ids[1][:8]}


def test_coordinator_ended_leaves_no_agent_on_the_cluster(stack: Stack, cluster: RayCluster) -> None:
    """The last test that uses the coordinator."""
    before = agents_below(cluster.process_id)

    stack.processes["coordinator"].terminate()
    stack.processes["coordinator"].wait(60)
    _, left = psutil.wait_procs(before, timeout=20)

    assert len(before) >= 2
    assert left == []
