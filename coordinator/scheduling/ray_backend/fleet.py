"""One agent on each node of a Ray cluster: placed by Ray, members like any other.

Entry point: :class:`RayFleet`. The nodes that are there together get one placement group (STRICT_SPREAD, a bundle a
node, of the node's free processors and memory); nodes that come later get one of their own. In every bundle lives an
actor that keeps an agent running as its child. When a node dies, Ray holds its bundle until a node comes that has the
room, and starts the actor there; the agent that it starts joins anew with a token of its own, and the old member, whose
key went with the node, is dismissed. Devices and jobs learn of an end from whoever notices first: the agent's control
stream, its lease, or Ray.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from coordinator.scheduling.ray_backend.actors import AgentActor
from coordinator.scheduling.ray_backend.placement import Bundle, RayNode, place

logger = logging.getLogger(__name__)

_LOOK_EVERY_S = 2.0
_READY_WITHIN_S = 20.0
"""Until Ray has set a group's bundles aside; if others took the room meanwhile, it never does."""
_RESCHEDULED_WITHIN_S = 10.0
"""A new node is left to Ray for so long while Ray holds a lost bundle, for which it may be the replacement."""
_END_WITHIN_S = 12.0
_FIRST_BACKOFF_S, _LAST_BACKOFF_S = 1.0, 60.0
_STEADY_AFTER_S = 60.0
"""An agent that ran for so long did not fail to start."""


class Admission(Protocol):
    """Who lets placed agents in."""

    async def token(self, name: str) -> str:
        """A join token for one device of this name; earlier members of the name are dismissed."""

    async def dismiss(self, name: str, reason: str) -> None:
        """The devices of this name are gone for good."""


@dataclass(slots=True, eq=False)
class _Seat:
    """A bundle of a placement group, with its agent."""

    group: Any
    index: int
    bundle: Bundle
    actor: Any = None
    task: asyncio.Task[None] | None = None


class RayFleet:
    """Keeps an agent on every node, until it is closed. Ray must be connected in this process.

    Args:
        admission: gives tokens, and hears of ends.
        is_loopback_only: the coordinator is reached from its own machine alone.
        module: the agents' program.
        look_every_s: between two looks at the cluster's nodes.
    """

    def __init__(
        self,
        admission: Admission,
        *,
        is_loopback_only: bool,
        module: str = "edge_node.cli",
        look_every_s: float = _LOOK_EVERY_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._admission = admission
        self._is_loopback_only = is_loopback_only
        self._module = module
        self._look_every_s = look_every_s
        self._clock = clock
        self._seats: list[_Seat] = []
        self._groups: list[Any] = []
        self._new_since_s: dict[str, float] = {}
        self._told: dict[str, str] = {}

    async def run(self) -> None:
        """Run forever: give nodes without an agent one."""
        while True:
            try:
                await self._look()
            except Exception:  # Ray raises plain ones while its head is away
                logger.exception("cannot look at the Ray cluster's nodes; looking again in %.0f s", self._look_every_s)
            await asyncio.sleep(self._look_every_s)

    async def close(self) -> None:
        """End all agents in good order, within a bound, and give their resources back."""
        for task in (tasks := [seat.task for seat in self._seats if seat.task is not None]):
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        actors = [seat.actor for seat in self._seats if seat.actor is not None]
        ends = [asyncio.ensure_future(_answer(actor.end.remote())) for actor in actors]
        if ends:
            done, late = await asyncio.wait(ends, timeout=_END_WITHIN_S)
            for end in late:
                end.cancel()
            failed = len(late) + sum(end.exception() is not None for end in done)
            if failed:
                logger.warning("%d of %d agents could not be told to end; Ray ends them", failed, len(ends))
        await asyncio.to_thread(_give_back, actors, self._groups)
        self._seats.clear()
        self._groups.clear()

    async def _look(self) -> None:
        nodes, here, placed = await asyncio.to_thread(_look_around, self._groups)
        is_waiting = len(placed) < len(self._seats)
        now_s = self._clock()
        self._new_since_s = {
            node.node_id: self._new_since_s.get(node.node_id, now_s) for node in nodes if node.node_id not in placed
        }
        covered = set(placed)
        if is_waiting:
            covered |= {i for i, since_s in self._new_since_s.items() if now_s - since_s < _RESCHEDULED_WITHIN_S}
        placement = place(nodes, covered, here if self._is_loopback_only else None)
        for node_id, reason in placement.left_out.items():
            if self._told.get(node_id) != reason:
                logger.warning("no agent is placed on a node of the Ray cluster: %s", reason)
        self._told = placement.left_out
        if placement.bundles:
            await self._add_group(placement.bundles, covered=set(placed))

    async def _add_group(self, bundles: tuple[Bundle, ...], covered: set[str]) -> None:
        group, node_ids = await asyncio.to_thread(_make_group, bundles)
        if node_ids is None or covered & node_ids:
            why = "others took the room" if node_ids is None else "Ray would put a second agent on a node"
            logger.warning("%d agents are not placed yet: %s; trying again", len(bundles), why)
            await asyncio.to_thread(_give_back, [], [group])
            return
        self._groups.append(group)
        for index, bundle in enumerate(bundles):
            seat = _Seat(group, index, bundle)
            seat.task = asyncio.create_task(self._keep_agent(seat), name=f"agent of bundle {index}")
            self._seats.append(seat)
        logger.info("Ray has set %d bundles aside for agents", len(bundles))

    async def _keep_agent(self, seat: _Seat) -> None:
        """An agent runs in the seat, again and again, on whichever node Ray puts it."""
        from ray.exceptions import ActorDiedError, RayError

        backoff_s = _FIRST_BACKOFF_S
        name = ""
        while True:
            started_s = self._clock()
            try:
                if seat.actor is None:
                    seat.actor = await asyncio.to_thread(_create_agent_actor, seat)
                # Not answered before Ray has a node for it, so that no token grows old in Ray's queue.
                node_id = str(await seat.actor.node_id.remote())
                name = await asyncio.to_thread(_device_name, node_id)
                token = await self._admission.token(name)
                logger.info("an agent starts as %s", name)
                started_s = self._clock()
                reason = await seat.actor.run.remote(token, self._arguments(name, seat.bundle), self._module)
            except ActorDiedError as error:
                # Ray restarts it without end, unless it could not even be set up.
                seat.actor = None
                reason = f"Ray gave its actor up: {error}"
            except RayError as error:
                reason = f"Ray lost it: {error}"
            if self._clock() - started_s > _STEADY_AFTER_S:
                backoff_s = _FIRST_BACKOFF_S
            logger.warning("the agent %s ended; starting one again in %.0f s: %s", name, backoff_s, reason)
            if name:
                await self._admission.dismiss(name, f"{name}: its agent ended")
            await asyncio.sleep(backoff_s)
            backoff_s = min(2 * backoff_s, _LAST_BACKOFF_S)

    @staticmethod
    def _arguments(name: str, bundle: Bundle) -> list[str]:
        return ["--name", name, *bundle.agent_options]


async def _answer(reference: Any) -> Any:
    return await reference


def _look_around(groups: list[Any]) -> tuple[list[RayNode], str, list[str]]:
    """Nodes that are alive, the address of this process's one, and the living node of each bundle that has one."""
    import ray
    from ray._private.state import available_resources_per_node
    from ray.util import placement_group_table

    free = available_resources_per_node()  # type: ignore[no-untyped-call]
    nodes = [
        RayNode(
            node_id=node["NodeID"],
            host=node["NodeManagerHostname"],
            address=node["NodeManagerAddress"],
            free_cpus=free.get(node["NodeID"], {}).get("CPU", 0.0),
            free_memory_bytes=free.get(node["NodeID"], {}).get("memory", 0.0),
            free_gpus=free.get(node["NodeID"], {}).get("GPU", 0.0),
        )
        for node in ray.nodes()  # type: ignore[no-untyped-call]
        if node["Alive"]
    ]
    alive = {node.node_id for node in nodes}
    held = [node_id for group in groups for node_id in placement_group_table(group)["bundles_to_node_id"].values()]
    here = str(ray.util.get_node_ip_address())  # type: ignore[no-untyped-call]
    return nodes, here, [node_id for node_id in held if node_id in alive]


def _make_group(bundles: tuple[Bundle, ...]) -> tuple[Any, set[str] | None]:
    """A placement group, and the nodes that it has bundles on; None if Ray found no room in time."""
    from ray.util import placement_group, placement_group_table

    group = placement_group([bundle.resources for bundle in bundles], strategy="STRICT_SPREAD")
    if not group.wait(_READY_WITHIN_S):
        return group, None
    return group, set(placement_group_table(group)["bundles_to_node_id"].values())


def _create_agent_actor(seat: _Seat) -> Any:
    import ray
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    strategy = PlacementGroupSchedulingStrategy(
        placement_group=seat.group, placement_group_bundle_index=seat.index, placement_group_capture_child_tasks=False
    )
    options = {
        "num_cpus": seat.bundle.num_cpus,
        "num_gpus": seat.bundle.num_gpus,
        "memory": seat.bundle.memory_bytes,
        # A call is never repeated by Ray: each start of an agent needs a token of its own.
        "max_restarts": -1,
        "max_task_retries": 0,
        "max_concurrency": 2,
        "scheduling_strategy": strategy,
    }
    return ray.remote(AgentActor).options(**options).remote()


def _device_name(node_id: str) -> str:
    """For people; the same for as long as the node lives."""
    import ray

    nodes = ray.nodes()  # type: ignore[no-untyped-call]
    hosts = {node["NodeID"]: str(node["NodeManagerHostname"]) for node in nodes}
    return f"ray-{hosts.get(node_id, 'node')[:40]}-{node_id[:8]}"


def _give_back(actors: list[Any], groups: list[Any]) -> None:
    import ray
    from ray.util import remove_placement_group

    for actor in actors:
        ray.kill(actor, no_restart=True)
    for group in groups:
        remove_placement_group(group)
