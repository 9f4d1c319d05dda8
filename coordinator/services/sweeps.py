"""SweepService: what people and programs ask of sweeps."""

from __future__ import annotations

from typing import Any

import grpc.aio
from pydantic import ValidationError

from coordinator.sweeps.manager import SweepManager
from plutino.errors import ConfigError, PlutinoError
from plutino.sweep import SweepSpec
from plutino.wire.status import abort_with_aio
from protos import sweeps_pb2 as pb
from protos import sweeps_pb2_grpc

Context = grpc.aio.ServicerContext[Any, Any]


class SweepServicer(sweeps_pb2_grpc.SweepServiceServicer):
    """Parses, calls the manager, maps errors."""

    def __init__(self, sweeps: SweepManager) -> None:
        self._sweeps = sweeps

    async def Submit(self, request: pb.SubmitSweepRequest, context: Context) -> pb.SubmitSweepResponse:
        """Store a sweep and begin it."""
        try:
            sweep_id = await self._sweeps.submit(_spec(request.spec_json), idempotency_key=request.idempotency_key)
        except PlutinoError as error:
            await abort_with_aio(context, error)
        return pb.SubmitSweepResponse(sweep_id=sweep_id)

    async def Get(self, request: pb.GetSweepRequest, context: Context) -> pb.GetSweepResponse:
        """A sweep as far as it has come."""
        try:
            status = self._sweeps.status(self._sweeps.find(request.sweep_id))
        except PlutinoError as error:
            await abort_with_aio(context, error)
        return pb.GetSweepResponse(status_json=status.model_dump_json())

    async def List(self, request: pb.ListSweepsRequest, context: Context) -> pb.ListSweepsResponse:
        """All sweeps, oldest first."""
        return pb.ListSweepsResponse(statuses_json=[s.model_dump_json() for s in self._sweeps.list_all()])

    async def Cancel(self, request: pb.CancelSweepRequest, context: Context) -> pb.GetSweepResponse:
        """End a sweep."""
        try:
            status = await self._sweeps.cancel(self._sweeps.find(request.sweep_id))
        except PlutinoError as error:
            await abort_with_aio(context, error)
        return pb.GetSweepResponse(status_json=status.model_dump_json())


def _spec(text: str) -> SweepSpec:
    try:
        return SweepSpec.model_validate_json(text)
    except ValidationError as error:
        raise ConfigError(f"the sweep cannot be read: {error}; send it with plutino's client") from error
