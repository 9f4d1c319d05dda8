from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.fleet.membership import Change, Device, DeviceState, Fleet
from plutino.types import AgentId

PI = AgentId("agent-pi")
DEVICE = Device(agent_id=PI, name="pi-3", host_id="h", memory_budget_bytes=4 << 30, baseline_bytes=350 << 20, threads=4)
EMPTY = Fleet(lease_s=10.0, suspect_after_s=4.0)


def joined(now_s: float = 0.0, stream: int = 1) -> Fleet:
    return EMPTY.hello(DEVICE, stream, now_s)[0]


def state_of(fleet: Fleet) -> DeviceState:
    return fleet.members[PI].state


def test_fleet_new_device_is_alive() -> None:
    fleet, changes = EMPTY.hello(DEVICE, 1, 0.0)

    assert fleet.in_state(DeviceState.ALIVE) == (DEVICE,)
    assert changes == (Change(agent_id=PI, before=None, after=DeviceState.ALIVE, reason="pi-3 joined"),)


def test_fleet_lost_stream_is_suspect_at_once_and_gone_after_its_lease() -> None:
    suspect, _ = joined().stream_lost(PI, 1, 1.0)
    gone, changes = suspect.tick(10.0)

    assert state_of(suspect) is DeviceState.SUSPECT
    assert state_of(suspect.tick(9.9)[0]) is DeviceState.SUSPECT
    assert state_of(gone) is DeviceState.GONE
    assert "its lease is 10.0 s" in changes[0].reason


def test_fleet_silent_device_is_suspect_then_heard_again() -> None:
    suspect, _ = joined().tick(4.0)
    healed, changes = suspect.heartbeat(PI, 1, 5.0)

    assert state_of(suspect) is DeviceState.SUSPECT
    assert state_of(healed) is DeviceState.ALIVE
    assert changes[0].reason == "pi-3 is heard again after 5.0 s"


def test_fleet_heartbeats_renew_the_lease_without_changes() -> None:
    fleet = joined()
    for second in range(1, 30):
        fleet, changes = fleet.heartbeat(PI, 1, float(second))
        assert changes == ()

    assert fleet.tick(30.0)[1] == ()


def test_fleet_device_attached_again_is_alive_with_its_new_offer() -> None:
    fleet, _ = joined().stream_lost(PI, 1, 1.0)

    fleet, changes = fleet.hello(replace(DEVICE, memory_budget_bytes=1 << 30), 2, 3.0)

    assert fleet.in_state(DeviceState.ALIVE)[0].memory_budget_bytes == 1 << 30
    assert changes[0].reason == "pi-3 attached again after 3.0 s"


def test_fleet_late_end_of_an_old_stream_means_nothing() -> None:
    fleet, _ = joined().hello(DEVICE, 2, 1.0)

    assert fleet.stream_lost(PI, 1, 2.0) == (fleet, ())
    assert fleet.hello(DEVICE, 1, 2.0) == (fleet, ())


def test_fleet_heartbeat_still_on_its_way_when_the_stream_broke_heals_nothing() -> None:
    fleet, _ = joined().stream_lost(PI, 1, 1.0)

    assert fleet.heartbeat(PI, 1, 2.0) == (fleet, ())


def test_fleet_gone_device_comes_back_only_with_a_hello() -> None:
    gone, _ = joined().tick(10.0)

    assert gone.heartbeat(PI, 1, 11.0) == (gone, ())
    assert state_of(gone.hello(DEVICE, 2, 11.0)[0]) is DeviceState.ALIVE


def test_fleet_device_that_says_goodbye_has_left_at_once_and_comes_back_only_with_a_hello() -> None:
    left, changes = joined().leave(PI, 1, 3.0, "pi-3 left: its agent was ended")

    assert [(change.after, change.reason) for change in changes] == [
        (DeviceState.LEFT, "pi-3 left: its agent was ended")
    ]
    assert left.heartbeat(PI, 1, 4.0) == (left, ())
    assert left.stream_lost(PI, 1, 4.0) == (left, ())
    assert left.tick(100.0) == (left, ()) and left.next_deadline_s() is None
    assert state_of(left.hello(DEVICE, 2, 11.0)[0]) is DeviceState.ALIVE


def test_fleet_goodbye_of_an_old_stream_means_nothing() -> None:
    fleet, _ = joined().hello(DEVICE, 2, 1.0)

    assert fleet.leave(PI, 1, 2.0, "late") == (fleet, ())
    assert EMPTY.leave(PI, 1, 2.0, "unknown") == (EMPTY, ())


def test_fleet_device_expected_back_after_a_restart_is_gone_when_lease_and_grace_are_over() -> None:
    expected, changes = EMPTY.expect(PI, "pi-3", 0.0, grace_s=5.0)
    gone, ended = expected.tick(15.0)

    assert [change.after for change in changes] == [DeviceState.SUSPECT]
    assert expected.tick(14.9) == (expected, ())
    assert expected.next_deadline_s() == 15.0
    assert state_of(gone) is DeviceState.GONE
    assert ended[0].reason == "pi-3 was not heard of for 15.0 s; its lease is 15.0 s"


def test_fleet_device_that_came_back_after_a_restart_has_its_ordinary_lease() -> None:
    back, _ = EMPTY.expect(PI, "pi-3", 0.0, grace_s=5.0)[0].hello(DEVICE, 1, 3.0)

    assert back.in_state(DeviceState.ALIVE) == (DEVICE,)
    assert state_of(back.tick(13.0)[0]) is DeviceState.GONE


def test_fleet_device_that_is_in_is_not_expected() -> None:
    assert joined().expect(PI, "pi-3", 1.0, grace_s=5.0) == (joined(), ())


def test_fleet_unknown_device_is_ignored() -> None:
    assert EMPTY.heartbeat(PI, 1, 0.0) == (EMPTY, ())
    assert EMPTY.stream_lost(PI, 1, 0.0) == (EMPTY, ())


def test_fleet_with_lease_shorter_than_suspicion_is_refused() -> None:
    with pytest.raises(ValueError, match="must be suspect"):
        Fleet(lease_s=2.0, suspect_after_s=2.0)


EVENTS = st.lists(
    st.tuples(
        st.sampled_from(["hello", "heartbeat", "stream_lost", "leave", "tick"]), st.floats(0, 6), st.integers(0, 3)
    ),
    max_size=30,
)


@given(EVENTS)
def test_fleet_after_any_events_ticks_to_gone_exactly_at_its_deadlines(events: list[tuple[str, float, int]]) -> None:
    fleet, now_s, newest = EMPTY, 0.0, 0
    for kind, wait_s, back in events:
        now_s += wait_s
        if kind == "hello":
            newest += 1
            fleet, _ = fleet.hello(DEVICE, newest, now_s)
        elif kind == "tick":
            fleet, _ = fleet.tick(now_s)
        else:
            why = ("ended",) if kind == "leave" else ()
            fleet, _ = getattr(fleet, kind)(PI, newest - back, now_s, *why)

    num_ticks = 0
    while (deadline_s := fleet.next_deadline_s()) is not None:
        fleet, changes = fleet.tick(deadline_s)
        num_ticks += 1
        assert changes

    assert num_ticks <= 2
    assert all(member.state.is_away for member in fleet.members.values())
