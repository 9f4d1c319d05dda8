"""Which nodes of a Ray cluster get an agent, and what of each node it gets: pure.

A node that gives an agent gives it all of its free processors, rounded down, and all of its free ``memory`` resource;
one that has a card free gives that too, and its agent computes there. Taking all processors is what keeps a second
bundle, of this or a later placement group, off the node.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from plutino.sizes import MIB, format_size

OVERHEAD_BYTES = 256 * MIB
"""Of a bundle's memory: the actor's process (125 MiB) and the agent's (60 MiB), with room; the rest is the workers'."""
LEAST_BUDGET_BYTES = 448 * MIB
"""A worker takes about 350 MiB before any job."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RayNode:
    """A node of the cluster that is alive."""

    node_id: str
    """New whenever the node starts anew."""
    host: str
    address: str
    free_cpus: float
    free_memory_bytes: float
    """What nobody has taken of Ray's ``memory`` resource."""
    free_gpus: float = 0.0
    """Whole cards that nobody has taken; Ray also counts parts of cards."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bundle:
    """What one agent takes of a node."""

    num_cpus: int
    memory_bytes: int
    num_gpus: int = 0
    """1 where the agent computes on a card; an agent has one device, so further cards of a node stay free."""

    @property
    def budget_bytes(self) -> int:
        """What the agent may give to its workers."""
        return self.memory_bytes - OVERHEAD_BYTES

    @property
    def resources(self) -> dict[str, float]:
        """In Ray's words."""
        cards = {"GPU": self.num_gpus} if self.num_gpus else {}
        return {"CPU": self.num_cpus, "memory": self.memory_bytes, **cards}

    @property
    def agent_options(self) -> tuple[str, ...]:
        """What an agent here is told of its device."""
        threads = ("--threads", str(self.num_cpus))
        if self.num_gpus:
            # Ray shows the actor the card that it gave it as the only one. The bundle's memory is the host's; of the
            # card's the agent gives what it gives by itself.
            return ("--device", "cuda:0", *threads)
        return ("--memory", f"{self.budget_bytes // MIB}MiB", *threads)


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """What to ask Ray for."""

    bundles: tuple[Bundle, ...]
    """One for each node that is to get an agent."""
    left_out: dict[str, str]
    """Why the other nodes get none, by node id."""


def place(nodes: Sequence[RayNode], covered: Collection[str], reachable_from: str | None = None) -> Placement:
    """Bundles for the nodes that have no agent.

    Args:
        nodes: nodes that are alive.
        covered: ids of nodes that have an agent, or will get one.
        reachable_from: the only address whose nodes reach the coordinator; None: all do.
    """
    bundles: list[Bundle] = []
    left_out: dict[str, str] = {}
    for node in sorted(nodes, key=lambda node: node.node_id):
        if node.node_id in covered:
            continue
        bundle = Bundle(
            num_cpus=int(node.free_cpus),
            memory_bytes=int(node.free_memory_bytes),
            num_gpus=min(1, int(node.free_gpus)),
        )
        if reachable_from is not None and node.address != reachable_from:
            left_out[node.node_id] = (
                f"{node.host} ({node.address}) does not reach the coordinator, which listens on loopback only; "
                "start it with --listen 0.0.0.0:7420"
            )
        elif bundle.num_cpus < 1:
            left_out[node.node_id] = f"{node.host} has {node.free_cpus:g} processors free in Ray, an agent needs 1"
        elif bundle.budget_bytes < LEAST_BUDGET_BYTES:
            left_out[node.node_id] = (
                f"{node.host} has {format_size(max(0, bundle.memory_bytes))} of Ray's memory resource free, an agent "
                f"needs {format_size(OVERHEAD_BYTES + LEAST_BUDGET_BYTES)}; start the node with more --memory"
            )
        else:
            bundles.append(bundle)
    return Placement(bundles=tuple(bundles), left_out=left_out)
