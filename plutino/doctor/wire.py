"""Probes over the wire: what a device sees of its coordinator, and what others see of the device."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import grpc

from plutino.doctor.door import Door, knock
from plutino.doctor.report import Finding, fail, ok, warn
from plutino.errors import PlutinoError
from plutino.security.certificates import BACKDATED_S
from plutino.security.tls import Credentials
from plutino.wire.channel import Lane, sync_channel
from plutino.wire.status import error_from_rpc
from protos import doctor_pb2, doctor_pb2_grpc

_CALL_TIMEOUT_S = 5.0
_DIAL_TIMEOUT_S = 15.0
_NUM_GREETINGS = 5

MAX_SKEW_S = 2.0
"""Logs of two machines can still be read side by side."""
RUINOUS_SKEW_S = BACKDATED_S
"""A certificate of one side is not valid yet on the other."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Greeting:
    """What a coordinator said of itself."""

    skew_s: float
    """Seconds that this machine's clock is ahead of the coordinator's."""
    round_trip_s: float
    """Of the fastest greeting; the skew is known to half of it."""
    versions: Mapping[str, str]
    wire_version: int
    bulk_address: str
    devices: tuple[str, ...]
    """Names of the devices that are in."""
    fleet_versions: Mapping[str, str]
    """Versions that most of the devices' memory runs; empty without devices."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Dialled:
    """One device that tried to dial another."""

    from_device: str
    to_device: str
    same_host: bool
    seconds: float
    error: str


def greet(address: str, credentials: Credentials | None = None) -> Greeting:
    """Ask a coordinator several times, and believe the fastest answer.

    Raises:
        UnreachableError: nobody answers there.
        PlutinoError: whatever else the coordinator met.
    """
    best: Greeting | None = None
    with sync_channel(address, Lane.CONTROL, credentials) as channel:
        stub = doctor_pb2_grpc.DoctorServiceStub(channel)
        for _ in range(_NUM_GREETINGS):
            asked_s, started_s = time.time(), time.perf_counter()
            try:
                answer = stub.Greet(doctor_pb2.GreetRequest(), timeout=_CALL_TIMEOUT_S)
            except grpc.RpcError as error:
                raise error_from_rpc(error, address) from None
            round_trip_s = time.perf_counter() - started_s
            if best is None or round_trip_s < best.round_trip_s:
                best = _greeting(answer, asked_s + round_trip_s / 2, round_trip_s)
    assert best is not None
    return best


def dial_back(
    address: str,
    *,
    host_id: str,
    credentials: Credentials | None = None,
    listen_host: str = "127.0.0.1",
    advertised_host: str | None = None,
) -> list[Dialled]:
    """Listen where workers would, and let the coordinator ask other devices to dial.

    Raises:
        ConfigError: this machine cannot listen there.
        PlutinoError: whatever the coordinator met.
    """
    with (
        Door(listen_host, credentials, advertised_host=advertised_host) as door,
        sync_channel(address, Lane.CONTROL, credentials) as channel,
    ):
        stub = doctor_pb2_grpc.DoctorServiceStub(channel)
        request = doctor_pb2.DialBackRequest(address=door.address, host_id=host_id)
        try:
            answer = stub.DialBack(request, timeout=_DIAL_TIMEOUT_S)
        except grpc.RpcError as error:
            raise error_from_rpc(error, address) from None
    return dialled(answer.dials)


def dialled(dials: Sequence[doctor_pb2.Dial]) -> list[Dialled]:
    """The values of messages."""
    return [
        Dialled(
            from_device=dial.from_device,
            to_device=dial.to_device,
            same_host=dial.same_host,
            seconds=dial.seconds,
            error=dial.error,
        )
        for dial in dials
    ]


def judge_port(what: str, address: str, lane: Lane, credentials: Credentials | None = None) -> Finding:
    """Whether a server answers at an address."""
    try:
        seconds = knock(address, credentials=credentials, lane=lane)
    except PlutinoError as error:
        return fail(what, str(error), f"on the coordinator's machine: plutino up; between: open {_port(address)}/tcp")
    return ok(what, f"{address} answers in {seconds * 1e3:.1f} ms")


def judge_clock(greeting: Greeting) -> Finding:
    """Whether certificates of one side are valid on the other."""
    said = (
        f"{abs(greeting.skew_s):.3f} s {'ahead of' if greeting.skew_s > 0 else 'behind'} the coordinator "
        f"(+- {greeting.round_trip_s / 2 * 1e3:.1f} ms)"
    )
    fix = "sudo timedatectl set-ntp true (on both machines)"
    if abs(greeting.skew_s) > RUINOUS_SKEW_S + greeting.round_trip_s / 2:
        return fail("clock", f"{said}; certificates are refused", fix)
    if abs(greeting.skew_s) > MAX_SKEW_S + greeting.round_trip_s / 2:
        return warn("clock", said, fix)
    return ok("clock", said)


def judge_dial_back(dials: Sequence[Dialled]) -> Finding:
    """Whether other devices reach this one's data plane."""
    name = "data plane"
    if not dials:
        return warn(name, "not tried: no other device is in", "start an agent on another device and repeat")
    reached = [dial for dial in dials if not dial.error]
    missed = [f"{dial.from_device} does not reach this device: {dial.error}" for dial in dials if dial.error]
    if missed:
        fix = (
            "let TCP from the other devices in (sudo ufw allow from 192.168.0.0/16 to any proto tcp, with your network)"
        )
        return fail(name, "; ".join(missed), fix)
    said = ", ".join(f"{dial.from_device} in {dial.seconds * 1e3:.1f} ms" for dial in reached)
    if all(dial.same_host for dial in reached):
        return warn(name, f"reached from this machine only: {said}", "start an agent on another machine and repeat")
    return ok(name, f"reached from {said}")


def judge_links(dials: Sequence[Dialled]) -> Finding:
    """Whether all devices reach each other."""
    if not dials:
        return ok("data plane", "fewer than two devices are in; nothing to dial")
    missed = [dial for dial in dials if dial.error]
    if missed:
        said = "; ".join(f"{dial.from_device} does not reach {dial.to_device}: {dial.error}" for dial in missed)
        closed = sorted({dial.to_device for dial in missed})
        fix = f"on {', '.join(closed)}: let TCP from the other devices in, then: plutino-node doctor"
        return fail("data plane", f"{len(missed)} of {len(dials)} directions: {said}", fix)
    slowest = max(dials, key=lambda dial: dial.seconds)
    said = f"slowest {slowest.from_device} to {slowest.to_device}, {slowest.seconds * 1e3:.1f} ms"
    return ok("data plane", f"all {len(dials)} directions between devices work; {said}")


def _greeting(answer: doctor_pb2.GreetResponse, here_s: float, round_trip_s: float) -> Greeting:
    return Greeting(
        skew_s=here_s - answer.now_s,
        round_trip_s=round_trip_s,
        versions=dict(answer.versions),
        wire_version=answer.wire_version,
        bulk_address=answer.bulk_address,
        devices=tuple(answer.devices),
        fleet_versions=dict(answer.fleet_versions),
    )


def _port(address: str) -> str:
    return address.rpartition(":")[2]
