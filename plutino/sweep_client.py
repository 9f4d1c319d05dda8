"""What a program asks of sweeps; reached through :attr:`plutino.client.Client.sweeps`."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from typing import Any

import grpc

from plutino.sweep import SweepSpec, SweepStatus
from protos import sweeps_pb2 as pb
from protos import sweeps_pb2_grpc

Call = Callable[[Callable[..., Any], Any], Any]
"""Calls a method with a request, and turns what it raises into our errors."""


class Sweeps:
    """Sweeps of a coordinator."""

    def __init__(self, channel: Callable[[], grpc.Channel], call: Call) -> None:
        self._channel = channel
        self._call = call

    def submit(self, spec: SweepSpec, *, idempotency_key: str | None = None) -> str:
        """Hand a sweep in; it is durable when this returns, and goes on without this program.

        Raises:
            ConfigError, ModelError: a trial is no job.
        """
        request = pb.SubmitSweepRequest(
            spec_json=spec.model_dump_json(), idempotency_key=idempotency_key or uuid.uuid4().hex
        )
        response: pb.SubmitSweepResponse = self._call(self._stub.Submit, request)
        return response.sweep_id

    def status(self, sweep_id: str) -> SweepStatus:
        """A sweep as far as it has come; the unambiguous beginning of an id will do.

        Raises:
            UnknownJobError: no sweep has this id.
        """
        response: pb.GetSweepResponse = self._call(self._stub.Get, pb.GetSweepRequest(sweep_id=sweep_id))
        return SweepStatus.model_validate_json(response.status_json)

    def list_all(self) -> list[SweepStatus]:
        """All sweeps, oldest first."""
        response: pb.ListSweepsResponse = self._call(self._stub.List, pb.ListSweepsRequest())
        return [SweepStatus.model_validate_json(text) for text in response.statuses_json]

    def cancel(self, sweep_id: str) -> SweepStatus:
        """End a sweep with the job that it runs; what was measured stays.

        Raises:
            UnknownJobError: no sweep has this id.
            InvalidTransitionError: it has ended already.
        """
        response: pb.GetSweepResponse = self._call(self._stub.Cancel, pb.CancelSweepRequest(sweep_id=sweep_id))
        return SweepStatus.model_validate_json(response.status_json)

    @property
    def _stub(self) -> sweeps_pb2_grpc.SweepServiceStub:
        return sweeps_pb2_grpc.SweepServiceStub(self._channel())
