"""Who is in: pure transitions of the set of devices, with the time as an argument.

A device holds a lease that every word of it renews. Entry point: :class:`Fleet`; every transition gives the new fleet
and what changed, with the reason. Times are seconds of one monotonic clock.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import Enum

from plutino.hardware import Hardware
from plutino.types import AgentId


class DeviceState(str, Enum):
    """What the coordinator believes of a device."""

    ALIVE = "alive"
    SUSPECT = "suspect"
    """Its stream broke or it is silent; its workers may well be running, so nothing of its is given away yet."""
    GONE = "gone"
    """Its lease ran out: its workers count as lost."""
    LEFT = "left"
    """It said goodbye: the same, without waiting for its lease. Often it is started again in a moment."""

    @property
    def is_away(self) -> bool:
        """Whether only a new hello brings the device back."""
        return self in (DeviceState.GONE, DeviceState.LEFT)


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """What an agent says of itself when it attaches."""

    agent_id: AgentId
    name: str
    host_id: str
    """Devices with the same host id share cores and memory bandwidth."""
    memory_budget_bytes: int
    """Bound on the resident memory of all workers of the device together."""
    baseline_bytes: int
    """Resident memory of a worker before any job."""
    threads: int
    versions: Mapping[str, str] = field(default_factory=dict)
    dtypes: tuple[str, ...] = ("fp32",)
    """Compute dtypes that the device runs, fastest first."""
    slow_dtypes: Mapping[str, float] = field(default_factory=dict)
    """Dtypes that it keeps back, with the factor over fp32's seconds."""
    hardware: Hardware = field(default_factory=Hardware)
    measures_links: bool = False
    """It takes and makes bursts."""
    processors: tuple[str, ...] = ()
    """What its workers compute on: numbers of cores, or a card; empty: not known."""
    processor_quota: float | None = None
    """How many of them its cgroup allows it at once; None: nothing bounds it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """One device as the fleet sees it."""

    device: Device
    state: DeviceState
    stream: int
    """Number of the stream the device last attached with."""
    last_heard_s: float
    is_stream_up: bool = True
    reason: str = ""
    """Why the device is not alive; empty while it is."""
    grace_s: float = 0.0
    """Added to its lease: a device has to notice first that the coordinator is a new one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """A device entered a state."""

    agent_id: AgentId
    before: DeviceState | None
    """None for a device that was never in."""
    after: DeviceState
    reason: str


Outcome = tuple["Fleet", tuple[Change, ...]]
"""The fleet after an event, and what changed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fleet:
    """All devices that ever attached to this coordinator."""

    lease_s: float
    """A device that is not heard of for so long is gone."""
    suspect_after_s: float
    """A device whose stream is up but silent for so long is suspect; a few heartbeats."""
    members: Mapping[AgentId, Member] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not 0 < self.suspect_after_s < self.lease_s:
            raise ValueError(
                f"a device must be suspect ({self.suspect_after_s} s) before its lease ends ({self.lease_s} s)"
            )

    def in_state(self, state: DeviceState) -> tuple[Device, ...]:
        """Devices in a state, by agent id."""
        return tuple(
            self.members[agent_id].device for agent_id in sorted(self.members) if self.members[agent_id].state is state
        )

    def expect(self, agent_id: AgentId, name: str, now_s: float, *, grace_s: float) -> Outcome:
        """A device that an earlier coordinator gave work to: if it does not attach within its lease, it is gone.

        Without this a device that died together with the coordinator would be waited for without end.
        """
        if agent_id in self.members:
            return self, ()
        stranger = Device(
            agent_id=agent_id, name=name, host_id="", memory_budget_bytes=0, baseline_bytes=0, threads=0, dtypes=()
        )
        reason = f"{name} has not attached since the coordinator started"
        suspect = Member(
            device=stranger,
            state=DeviceState.SUSPECT,
            stream=0,
            last_heard_s=now_s,
            is_stream_up=False,
            reason=reason,
            grace_s=grace_s,
        )
        return self._become(suspect, None, reason)

    def hello(self, device: Device, stream: int, now_s: float) -> Outcome:
        """A device attached with a new stream: it is alive, whatever it was before.

        ``stream`` numbers all streams of the coordinator in the order they were opened. A stream that is not newer
        than the device's present one is a late message of the past and changes nothing.
        """
        known = self.members.get(device.agent_id)
        if known is not None and stream <= known.stream:
            return self, ()
        member = Member(device=device, state=DeviceState.ALIVE, stream=stream, last_heard_s=now_s)
        if known is None:
            return self._become(member, None, f"{device.name} joined")
        silent_s = now_s - known.last_heard_s
        return self._become(member, known.state, f"{device.name} attached again after {silent_s:.1f} s")

    def heartbeat(self, agent_id: AgentId, stream: int, now_s: float) -> Outcome:
        """A device was heard on a stream; on its present one this renews the lease and heals a silent device."""
        known = self.members.get(agent_id)
        # Only a new hello brings a gone device back: it must say which of its workers are still alive.
        # And a word that was still on its way when its stream broke proves nothing.
        if known is None or stream != known.stream or not known.is_stream_up or known.state.is_away:
            return self, ()
        reason = f"{known.device.name} is heard again after {now_s - known.last_heard_s:.1f} s"
        return self._become(replace(known, state=DeviceState.ALIVE, last_heard_s=now_s, reason=""), known.state, reason)

    def stream_lost(self, agent_id: AgentId, stream: int, now_s: float) -> Outcome:
        """A stream of a device broke; if it was its present one, the device is suspect at once.

        The end of an older stream is often noticed after the device has long attached again, and means nothing.
        """
        known = self.members.get(agent_id)
        if known is None or stream != known.stream or known.state.is_away:
            return self, ()
        left_s = max(0.0, known.last_heard_s + self.lease_s - now_s)
        reason = f"the control stream of {known.device.name} broke; it has {left_s:.1f} s to attach again"
        suspect = replace(known, state=DeviceState.SUSPECT, is_stream_up=False, reason=reason)
        return self._become(suspect, known.state, reason)

    def leave(self, agent_id: AgentId, stream: int, now_s: float, reason: str) -> Outcome:
        """A device says that it ends; on another stream than its present one that is a late message of the past."""
        known = self.members.get(agent_id)
        if known is None or stream != known.stream or known.state.is_away:
            return self, ()
        left = replace(known, state=DeviceState.LEFT, last_heard_s=now_s, reason=reason)
        return self._become(left, known.state, reason)

    def revoke(self, agent_id: AgentId, reason: str) -> Outcome:
        """A device was shut out: it is gone at once, whatever is left of its lease."""
        known = self.members.get(agent_id)
        if known is None:
            return self, ()
        gone = replace(known, state=DeviceState.GONE, is_stream_up=False, reason=reason)
        return self._become(gone, known.state, reason)

    def tick(self, now_s: float) -> Outcome:
        """The time went on: silent devices become suspect, devices without a lease are gone."""
        fleet: Fleet = self
        changes: tuple[Change, ...] = ()
        for agent_id in sorted(self.members):
            fleet, more = fleet._judge(self.members[agent_id], now_s)
            changes += more
        return fleet, changes

    def next_deadline_s(self) -> float | None:
        """When :meth:`tick` may change something next; None if never."""
        deadlines = [
            member.last_heard_s
            + (self.suspect_after_s if member.state is DeviceState.ALIVE else self.lease_s + member.grace_s)
            for member in self.members.values()
            if not member.state.is_away
        ]
        return min(deadlines, default=None)

    def _judge(self, member: Member, now_s: float) -> Outcome:
        silent_s = now_s - member.last_heard_s
        name = member.device.name
        if member.state.is_away:
            return self, ()
        # Compared as deadlines, like next_deadline_s computes them: a tick at the deadline must not just miss it.
        lease_s = self.lease_s + member.grace_s
        if now_s >= member.last_heard_s + lease_s:
            reason = f"{name} was not heard of for {silent_s:.1f} s; its lease is {lease_s:.1f} s"
            return self._become(replace(member, state=DeviceState.GONE, reason=reason), member.state, reason)
        if member.state is DeviceState.ALIVE and now_s >= member.last_heard_s + self.suspect_after_s:
            reason = f"{name} is silent for {silent_s:.1f} s, though its stream is up"
            return self._become(replace(member, state=DeviceState.SUSPECT, reason=reason), member.state, reason)
        return self, ()

    def _become(self, member: Member, before: DeviceState | None, reason: str) -> Outcome:
        agent_id = member.device.agent_id
        fleet = replace(self, members={**self.members, agent_id: member})
        if before is member.state:
            return fleet, ()
        return fleet, (Change(agent_id=agent_id, before=before, after=member.state, reason=reason),)
