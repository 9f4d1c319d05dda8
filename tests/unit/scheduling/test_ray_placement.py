from __future__ import annotations

from dataclasses import replace

from coordinator.scheduling.ray_backend.placement import LEAST_BUDGET_BYTES, OVERHEAD_BYTES, Bundle, RayNode, place
from plutino.sizes import GIB, MIB


def node(name: str, *, cpus: float = 2.0, memory_bytes: float = 4 * GIB, address: str = "10.0.0.1") -> RayNode:
    return RayNode(node_id=name, host=name, address=address, free_cpus=cpus, free_memory_bytes=memory_bytes)


def test_place_unequal_nodes_each_gives_what_it_has_free() -> None:
    found = place([node("b", cpus=1.9, memory_bytes=900 * MIB + 0.5), node("a", cpus=8)], covered=())

    assert found.bundles == (
        Bundle(num_cpus=8, memory_bytes=4 * GIB),
        Bundle(num_cpus=1, memory_bytes=900 * MIB),
    )
    assert found.bundles[1].budget_bytes == 900 * MIB - OVERHEAD_BYTES
    assert found.left_out == {}


def test_place_node_with_cards_gives_its_agent_one_of_them() -> None:
    found = place([replace(node("a"), free_gpus=2.0), replace(node("b"), free_gpus=0.5), node("c")], covered=())

    assert [bundle.num_gpus for bundle in found.bundles] == [1, 0, 0]
    assert found.bundles[0].resources == {"CPU": 2, "memory": 4 * GIB, "GPU": 1}
    assert "GPU" not in found.bundles[1].resources
    assert found.bundles[0].agent_options == ("--device", "cuda:0", "--threads", "2")
    assert found.bundles[1].agent_options == ("--memory", "3840MiB", "--threads", "2")


def test_place_covered_node_gets_no_second_agent() -> None:
    assert place([node("a"), node("b")], covered={"a"}).bundles == (Bundle(num_cpus=2, memory_bytes=4 * GIB),)


def test_place_node_without_processors_says_so() -> None:
    found = place([node("head", cpus=0.5)], covered=())

    assert found.bundles == ()
    assert found.left_out["head"] == "head has 0.5 processors free in Ray, an agent needs 1"


def test_place_node_without_memory_for_a_worker_says_what_is_missing() -> None:
    found = place([node("board", memory_bytes=OVERHEAD_BYTES + LEAST_BUDGET_BYTES - 1)], covered=())

    assert found.bundles == ()
    assert "needs 704 MiB" in found.left_out["board"]


def test_place_coordinator_on_loopback_leaves_other_machines_out_with_the_way_out() -> None:
    found = place([node("a"), node("b", address="10.0.0.2")], covered=(), reachable_from="10.0.0.1")

    assert len(found.bundles) == 1
    assert "--listen 0.0.0.0:7420" in found.left_out["b"]
