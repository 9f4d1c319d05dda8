"""Who measures when, and beside whom: devices of one host without a process among them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

import pytest

from coordinator.fleet.agent_link import OnMilestone, ProfileAnswer
from coordinator.fleet.membership import Device
from coordinator.jobs import profiler as profiler_module
from coordinator.jobs.profiler import Asked, Profiler, Seconds
from partitioner.device import BlockTimings, ProfileRequest
from plutino.errors import AgentError, AgentLostError
from plutino.job.method import LoraConfig
from plutino.types import AgentId

REQUEST = ProfileRequest(
    config_json="{}",
    dtype="fp32",
    micro_batch_rows=1,
    row_tokens=1,
    label_tokens=1,
    method=LoraConfig(),
    threads=1,
)
NUM_MILESTONES = 4


class FakeFleet:
    """Devices of one host that meet like real ones; each may fail at a milestone, or never come to it."""

    def __init__(self, *processors: str) -> None:
        self.devices = [
            Device(
                agent_id=AgentId(name),
                name=name,
                host_id="one",
                memory_budget_bytes=1,
                baseline_bytes=1,
                threads=1,
                processors=(on,) if on else (),
            )
            for name, on in zip("abc", processors, strict=False)
        ]
        self.slowdowns: dict[str, Sequence[float]] = {}
        self.kept: dict[str, set[tuple[int, ...]]] = {}
        """What each has measured before, by its company."""
        self.refusing: set[str] = set()
        self.failing: dict[str, int] = {}
        self.hanging: dict[str, int] = {}
        self.said: list[str] = []
        """Begun measurements and milestones passed, in order."""
        self.asked: list[tuple[str, bool, int]] = []
        self.company: dict[str, tuple[int, ...]] = {}

    async def kept_profile(self, agent_id: AgentId, request: ProfileRequest) -> BlockTimings | None:
        if agent_id in self.refusing:
            raise AgentError("no room to measure")
        return timings(1.0) if request.beside in self.kept.get(agent_id, ()) else None

    async def profile(
        self, agent_id: AgentId, request: ProfileRequest, on_milestone: OnMilestone | None = None
    ) -> ProfileAnswer:
        assert on_milestone is not None
        turn = sum(name == agent_id for name, *_ in self.asked)
        self.asked.append((agent_id, request.is_fresh, request.attempt))
        self.company[agent_id] = request.beside
        self.said.append(f"{agent_id} begins")
        is_whole = True
        for milestone in range(NUM_MILESTONES if request.beside else 0):
            if self.failing.get(agent_id) == milestone:
                raise AgentLostError("lost")
            if self.hanging.get(agent_id) == milestone:
                await asyncio.Event().wait()
            goes_on: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
            on_milestone(milestone, goes_on.set_result)
            is_whole &= await goes_on
            self.said.append(f"{agent_id} passes {milestone}")
        await asyncio.sleep(0)
        slowdowns = self.slowdowns.get(agent_id, (1.0,))
        return ProfileAnswer(timings(slowdowns[min(turn, len(slowdowns) - 1)]), lacked_company=not is_whole)


def timings(slowdown: float) -> BlockTimings:
    return BlockTimings(
        forward_s=0.01 * slowdown,
        backward_s=0.02 / slowdown,
        embedding_s=0.0,
        head_forward_s=0.01,
        head_backward_s=0.01 * slowdown,
    )


def measure(
    fleet: FakeFleet, between: Callable[[Profiler], object] | None = None, times: int = 1
) -> list[Seconds | AgentError]:
    async def run() -> list[Seconds | AgentError]:
        profiler = Profiler(fleet)  # type: ignore[arg-type]
        asked = [Asked(device, REQUEST) for device in fleet.devices]
        found = await profiler.measure(asked)
        for _ in range(times - 1):
            if between is not None:
                between(profiler)
            found = await profiler.measure(asked)
        return found

    return asyncio.run(asyncio.wait_for(run(), 30))


def seconds_of(found: Sequence[Seconds | AgentError]) -> list[Seconds]:
    assert all(isinstance(one, Seconds) for one in found), found
    return [one for one in found if isinstance(one, Seconds)]


def test_devices_on_the_same_cores_measure_alone_in_turns_and_the_faster_of_two_counts() -> None:
    fleet = FakeFleet("", "")
    fleet.slowdowns = {"a": (1.3, 1.0), "b": (1.0, 2.0)}

    left, right = seconds_of(measure(fleet, times=2))

    assert [name for name, *_ in fleet.asked] == ["a", "b", "a", "b"]
    assert set(fleet.company.values()) == {()}
    assert (left.timings.forward_s, right.timings.forward_s) == (0.01, 0.01)


def test_devices_with_their_own_cores_measure_once_and_none_passes_a_milestone_before_all_are_there() -> None:
    fleet = FakeFleet("0", "1", "2")

    found = seconds_of(measure(fleet, times=2))

    assert sorted(fleet.asked) == [("a", False, 0), ("b", False, 0), ("c", False, 0)]
    milestones = [int(said.split()[-1]) for said in fleet.said if "passes" in said]
    assert milestones == sorted(milestones) and len(milestones) == 3 * NUM_MILESTONES
    assert fleet.company == {"a": (1, 1), "b": (1, 1), "c": (1, 1)}
    assert not any(one.remark for one in found)


def test_seconds_kept_from_another_company_do_not_count_and_who_knows_its_own_computes_beside_the_others() -> None:
    fleet = FakeFleet("0", "1")
    fleet.kept = {"a": {(), (1,)}, "b": {()}}

    measure(fleet)

    # The first measures although it has kept its seconds, and forgets nothing for it.
    assert sorted(fleet.asked) == [("a", True, 1), ("b", False, 0)]
    fleet.kept["b"].add((1,))
    fleet.asked.clear()
    measure(fleet)
    assert fleet.asked == []


def test_device_that_is_lost_in_the_middle_leaves_the_others_with_a_remark_and_a_measurement_to_make_again() -> None:
    fleet = FakeFleet("0", "1", "2")
    fleet.failing = {"b": 1}

    left, lost, right = measure(fleet, times=2)

    assert isinstance(lost, AgentLostError)
    for one in seconds_of([left, right]):
        assert one.remark.startswith("measured without b, which did not measure (lost)")
        assert "the next plan measures anew" in one.remark
    assert [name for name, *_ in fleet.asked].count("a") == 2


def test_device_that_never_comes_is_waited_for_within_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    fleet = FakeFleet("0", "1")
    fleet.hanging = {"b": 0}
    patience: dict[str, float] = {"patience_s": 0.01}
    real = profiler_module.HostMeeting
    monkeypatch.setattr(profiler_module, "HostMeeting", lambda members: real(members, **patience))

    async def run() -> str:
        asked = [Asked(device, REQUEST) for device in fleet.devices]
        measuring = asyncio.create_task(Profiler(fleet).measure(asked))  # type: ignore[arg-type]
        while "a passes 3" not in fleet.said:
            await asyncio.sleep(0)
        measuring.cancel()
        return fleet.said[-1]

    assert asyncio.run(asyncio.wait_for(run(), 30)) == "a passes 3"


def test_device_that_a_job_fills_is_no_company() -> None:
    fleet = FakeFleet("0", "1", "2")
    fleet.refusing = {"b"}

    left, refused, right = measure(fleet, times=2)

    assert str(refused) == "no room to measure"
    assert not any(one.remark for one in seconds_of([left, right]))
    assert fleet.company == {"a": (1,), "c": (1,)}
    assert len(fleet.asked) == 2


def test_device_that_is_doubted_measures_anew_with_the_others_beside_it() -> None:
    fleet = FakeFleet("0", "1")

    measure(fleet, lambda profiler: profiler.doubt(AgentId("a")), times=2)

    # Only the doubted one forgets what it had kept.
    assert sorted(fleet.asked[2:]) == [("a", True, 0), ("b", True, 1)]


def test_device_on_shared_cores_that_has_kept_its_seconds_measures_nothing_and_its_neighbour_twice() -> None:
    fleet = FakeFleet("", "")
    fleet.kept = {"a": {()}}

    measure(fleet)

    assert fleet.asked == [("b", False, 0), ("b", True, 1)]
