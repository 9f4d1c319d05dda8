"""What a program asks of LLM2LLM loops; reached through :attr:`plutino.client.Client.loops`."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from typing import Any

import grpc

from plutino.llm2llm import LoopSpec, LoopStatus, Sample
from protos import llm2llm_pb2 as pb
from protos import llm2llm_pb2_grpc

Call = Callable[[Callable[..., Any], Any], Any]
"""Calls a method with a request, and turns what it raises into our errors."""


class Loops:
    """Loops of a coordinator."""

    def __init__(self, channel: Callable[[], grpc.Channel], call: Call) -> None:
        self._channel = channel
        self._call = call

    def submit(self, spec: LoopSpec, *, idempotency_key: str | None = None) -> str:
        """Hand a loop in; it is durable when this returns, and goes on without this program.

        Raises:
            ConfigError, DataError: its seed, its job or its teacher cannot be used.
        """
        request = pb.SubmitLoopRequest(
            spec_json=spec.model_dump_json(), idempotency_key=idempotency_key or uuid.uuid4().hex
        )
        response: pb.SubmitLoopResponse = self._call(self._stub.Submit, request)
        return response.loop_id

    def status(self, loop_id: str) -> LoopStatus:
        """A loop as far as it has come; the unambiguous beginning of an id will do.

        Raises:
            UnknownJobError: no loop has this id.
        """
        return _status(self._call(self._stub.Get, pb.LoopRequest(loop_id=loop_id)))

    def list_all(self) -> list[LoopStatus]:
        """All loops, oldest first."""
        response: pb.ListLoopsResponse = self._call(self._stub.List, pb.ListLoopsRequest())
        return [LoopStatus.model_validate_json(text) for text in response.statuses_json]

    def cancel(self, loop_id: str) -> LoopStatus:
        """End a loop with the job that it runs; what it has stays.

        Raises:
            UnknownJobError: no loop has this id.
            InvalidTransitionError: it has ended already.
        """
        return _status(self._call(self._stub.Cancel, pb.LoopRequest(loop_id=loop_id)))

    def resume(self, loop_id: str) -> LoopStatus:
        """Go on with a loop that failed or was cancelled.

        Raises:
            UnknownJobError: no loop has this id.
            InvalidTransitionError: it runs, or has succeeded.
        """
        return _status(self._call(self._stub.Resume, pb.LoopRequest(loop_id=loop_id)))

    def samples(self, loop_id: str) -> list[Sample]:
        """Everything that came of the teacher's answers, in order.

        Raises:
            UnknownJobError: no loop has this id.
        """
        request = pb.LoopRequest(loop_id=self.status(loop_id).loop_id)
        found = self._call(lambda asked, **options: list(self._stub.Samples(asked, **options)), request)
        return [Sample.model_validate_json(one.sample_json) for one in found]

    @property
    def _stub(self) -> llm2llm_pb2_grpc.Llm2LlmServiceStub:
        return llm2llm_pb2_grpc.Llm2LlmServiceStub(self._channel())


def _status(response: pb.LoopResponse) -> LoopStatus:
    return LoopStatus.model_validate_json(response.status_json)
