"""Llm2LlmService: what people and programs ask of LLM2LLM loops."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import grpc.aio
from pydantic import ValidationError

from coordinator.llm2llm.manager import LoopManager
from plutino.errors import ConfigError, PlutinoError
from plutino.llm2llm import LoopSpec
from plutino.wire.status import abort_with_aio
from protos import llm2llm_pb2 as pb
from protos import llm2llm_pb2_grpc

Context = grpc.aio.ServicerContext[Any, Any]


class Llm2LlmServicer(llm2llm_pb2_grpc.Llm2LlmServiceServicer):
    """Parses, calls the manager, maps errors."""

    def __init__(self, loops: LoopManager) -> None:
        self._loops = loops

    async def Submit(self, request: pb.SubmitLoopRequest, context: Context) -> pb.SubmitLoopResponse:
        """Store a loop and begin it."""
        try:
            loop_id = await self._loops.submit(_spec(request.spec_json), idempotency_key=request.idempotency_key)
        except PlutinoError as error:
            await abort_with_aio(context, error)
        return pb.SubmitLoopResponse(loop_id=loop_id)

    async def Get(self, request: pb.LoopRequest, context: Context) -> pb.LoopResponse:
        """A loop as far as it has come."""
        try:
            status = self._loops.status(self._loops.find(request.loop_id))
        except PlutinoError as error:
            await abort_with_aio(context, error)
        return pb.LoopResponse(status_json=status.model_dump_json())

    async def List(self, request: pb.ListLoopsRequest, context: Context) -> pb.ListLoopsResponse:
        """All loops, oldest first."""
        return pb.ListLoopsResponse(statuses_json=[status.model_dump_json() for status in self._loops.list_all()])

    async def Cancel(self, request: pb.LoopRequest, context: Context) -> pb.LoopResponse:
        """End a loop."""
        try:
            status = await self._loops.cancel(self._loops.find(request.loop_id))
        except PlutinoError as error:
            await abort_with_aio(context, error)
        return pb.LoopResponse(status_json=status.model_dump_json())

    async def Resume(self, request: pb.LoopRequest, context: Context) -> pb.LoopResponse:
        """Go on with a loop that ended before its end."""
        try:
            status = await self._loops.resume(self._loops.find(request.loop_id))
        except PlutinoError as error:
            await abort_with_aio(context, error)
        return pb.LoopResponse(status_json=status.model_dump_json())

    async def Samples(self, request: pb.LoopRequest, context: Context) -> AsyncIterator[pb.LoopSample]:
        """What came of the teacher's answers."""
        try:
            samples = self._loops.samples(self._loops.find(request.loop_id))
        except PlutinoError as error:
            await abort_with_aio(context, error)
        for sample in samples:
            yield pb.LoopSample(sample_json=sample.model_dump_json())


def _spec(text: str) -> LoopSpec:
    try:
        return LoopSpec.model_validate_json(text)
    except ValidationError as error:
        raise ConfigError(f"the loop cannot be read: {error}; send it with plutino's client") from error
