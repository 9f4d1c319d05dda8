"""What it costs to move a running job to another plan, from what its last loading showed: pure.

Every move stops all workers at a commit and starts them again. What a job pays once (the base model fetched from a hub,
hashed, packed on the coordinator) is no part of it, and what a device holds already it reads from its own disk.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from coordinator.scheduling.problem import PlanningProblem
from partitioner.plan import Plan, ReplicaPlan, StagePlan

STOP_S = 1.0
"""Until workers that were told to finish have ended."""
_AT_HAND = frozenset(("cache", "held here"))
"""Places of bytes that came over no network."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StageLoad:
    """How one worker loaded its stage."""

    agent_id: str
    seconds: float
    bytes_by_place: Mapping[str, int]

    @property
    def fetched_bytes(self) -> int:
        """What came from the coordinator or from other devices."""
        return sum(n for place, n in self.bytes_by_place.items() if place not in _AT_HAND)

    @property
    def num_bytes(self) -> int:
        """Of the whole stage, as it is stored."""
        return sum(self.bytes_by_place.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadingTimes:
    """How the workers of a plan came to be."""

    total_s: float
    """From asking the devices until all workers were loaded and linked."""
    stages: tuple[StageLoad, ...] = ()
    """Of the workers that were started."""

    @property
    def around_s(self) -> float:
        """What the slowest worker's own loading does not explain: processes begun, neighbours reached."""
        return max(0.0, self.total_s - max((stage.seconds for stage in self.stages), default=0.0))


def move_cost_s(
    present: Plan,
    new: Plan,
    problem: PlanningProblem,
    *,
    loading: LoadingTimes,
    upload_s: float,
    factors: Mapping[str, float] | None = None,
) -> float:
    """Seconds that no step runs: store the state, stop, load, restore.

    Args:
        present: the plan that runs.
        new: the plan to move to.
        problem: what both were priced with.
        loading: of the present plan's workers, or of an earlier plan's.
        upload_s: measured, of the slowest shadow.
        factors: devices that compute slower or faster than when they loaded, and by how much.
    """
    slowest_s = max(
        _load_s(stage, replica, present, problem, loading) * (factors or {}).get(replica.agent_id, 1.0)
        for stage in new.stages
        for replica in stage.replicas
    )
    return upload_s + STOP_S + loading.around_s + slowest_s + _fetch_s(present, new, problem)


def _load_s(
    stage: StagePlan, replica: ReplicaPlan, present: Plan, problem: PlanningProblem, loading: LoadingTimes
) -> float:
    """Seconds of a worker's own loading without what must be fetched, scaled by its blocks."""
    found = [load for load in loading.stages if load.agent_id == replica.agent_id] or loading.stages
    rates = [_own_s(load, problem) / _num_blocks(load.agent_id, present) for load in found]
    return max(rates, default=0.0) * (stage.end_block - stage.start_block)


def _own_s(load: StageLoad, problem: PlanningProblem) -> float:
    """Seconds that a worker would have taken with all bytes at hand, if what it fetched came at the assumed rate."""
    return max(0.0, load.seconds - load.fetched_bytes / problem.links.other.bandwidth_bytes_per_s)


def _num_blocks(agent_id: str, plan: Plan) -> int:
    """Blocks that a device has in a plan; those of the smallest stage for one that is not in it."""
    sizes = {agent: stage.end_block - stage.start_block for stage in plan.stages for agent in stage.agent_ids}
    return sizes.get(agent_id, min(sizes.values()))


def _fetch_s(present: Plan, new: Plan, problem: PlanningProblem) -> float:
    """Seconds on the network for blocks that a device does not hold; the devices share one way out."""
    link = problem.links.other
    hosts = {device.agent_id: device.host_id for device in problem.devices}
    seconds = 0.0
    for stage in new.stages:
        for replica in stage.replicas:
            weights = sum(item.bytes for item in replica.memory if item.name in ("weights", "packed weights"))
            blocks = range(stage.start_block, stage.end_block)
            at_hand = _blocks_on(hosts.get(replica.agent_id, replica.agent_id), present, hosts)
            lacking = sum(block not in at_hand for block in blocks)
            seconds += weights * lacking / len(blocks) / link.bandwidth_bytes_per_s
    return seconds


def _blocks_on(host_id: str, plan: Plan, hosts: Mapping[str, str]) -> set[int]:
    """Blocks that some agent of a host has loaded: agents of one host share their cache, or have it over loopback."""
    return {
        block
        for stage in plan.stages
        for agent_id in stage.agent_ids
        if hosts.get(agent_id, agent_id) == host_id
        for block in range(stage.start_block, stage.end_block)
    }
