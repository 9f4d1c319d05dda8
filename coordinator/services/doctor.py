"""DoctorService: what a device's doctor asks."""

from __future__ import annotations

import time
from typing import Any

import grpc.aio

from coordinator.fleet.links import Dial, dial_back
from coordinator.fleet.registry import FleetRegistry
from coordinator.jobs.eligibility import agreed_versions
from plutino.errors import PlutinoError
from plutino.hardware import WIRE_VERSION
from plutino.security.interceptors import caller_of
from plutino.versions import installed_versions
from plutino.wire.status import abort_with_aio
from protos import doctor_pb2 as pb
from protos import doctor_pb2_grpc

Context = grpc.aio.ServicerContext[Any, Any]


class DoctorServicer(doctor_pb2_grpc.DoctorServiceServicer):
    """Tells of the coordinator, and lets the fleet dial."""

    def __init__(self, fleet: FleetRegistry, bulk_address: str) -> None:
        self._fleet = fleet
        self._bulk_address = bulk_address
        self._versions = installed_versions()

    async def Greet(self, request: pb.GreetRequest, context: Context) -> pb.GreetResponse:
        """The coordinator's clock, versions and addresses."""
        return pb.GreetResponse(
            versions=self._versions,
            wire_version=WIRE_VERSION,
            bulk_address=self._bulk_address,
            devices=[device.name for device in self._fleet.devices],
            fleet_versions=agreed_versions(self._fleet.devices),
            now_s=time.time(),
        )

    async def DialBack(self, request: pb.DialBackRequest, context: Context) -> pb.DialBackResponse:
        """Lets devices that are in dial the caller."""
        try:
            caller = caller_of(context.auth_context())
            dials = await dial_back(
                self._fleet,
                request.address,
                node_id="" if caller is None else caller.name,
                host_id=request.host_id,
                caller_host=_host_of(context.peer()),
            )
        except PlutinoError as error:
            await abort_with_aio(context, error)
        return pb.DialBackResponse(dials=[dial_to_proto(dial) for dial in dials])


def dial_to_proto(dial: Dial) -> pb.Dial:
    """The message of a value."""
    return pb.Dial(
        from_device=dial.from_device,
        to_device=dial.to_device,
        same_host=dial.same_host,
        seconds=dial.seconds,
        error=dial.error,
    )


def _host_of(peer: str) -> str:
    """The address in gRPC's name of a peer: ``ipv4:10.0.0.2:4711`` or ``ipv6:%5B::1%5D:4711``."""
    _, _, rest = peer.partition(":")
    host = rest.rpartition(":")[0]
    return host.replace("%5B", "").replace("%5D", "").strip("[]")
