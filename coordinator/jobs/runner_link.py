"""The coordinator's end of a runner's stream: ask a question, get its answer, whatever happens to the runner between.

Every question is idempotent, so one whose runner died is asked again of the next one.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

from coordinator.jobs.prepared import PreparedData
from plutino import errors
from plutino.errors import JobError, PlutinoError
from protos import runners_pb2 as pb

logger = logging.getLogger(__name__)

ATTACH_TIMEOUT_S = 120.0
"""A runner imports its libraries and, under Ray, waits for a worker process; beyond this it is broken."""


@dataclass(slots=True)
class _Question:
    command: pb.RunnerCommand
    answer: asyncio.Future[list[pb.RunnerEvent]]
    parts: list[pb.RunnerEvent] = field(default_factory=list)


class _RunnerGoneError(Exception):
    """The runner's stream ended before the answer was complete."""


class RunnerLink:
    """One job's runner, present or awaited."""

    def __init__(self, spec_json: str, ensure_running: Callable[[], None]) -> None:
        self._spec_json = spec_json
        self._ensure_running = ensure_running
        self._numbers = itertools.count(1)
        self._outgoing: asyncio.Queue[pb.RunnerCommand | None] | None = None
        self._waiting: dict[str, _Question] = {}
        self._attached = asyncio.Event()
        self._prepared: PreparedData | None = None

    async def serve(self, events: AsyncIterator[pb.RunnerEvent]) -> AsyncIterator[pb.RunnerCommand]:
        """One stream of the runner: yields questions, takes answers; a newer stream ends an older one."""
        outgoing: asyncio.Queue[pb.RunnerCommand | None] = asyncio.Queue()
        if self._outgoing is not None:
            self._outgoing.put_nowait(None)
        self._outgoing = outgoing
        self._prepared = None
        self._attached.set()
        reader = asyncio.create_task(self._read(events, outgoing))
        try:
            while (command := await outgoing.get()) is not None:
                yield command
        finally:
            reader.cancel()
            if self._outgoing is outgoing:
                self._outgoing = None
                self._attached.clear()
            for question in self._waiting.values():
                if not question.answer.done():
                    question.answer.set_exception(_RunnerGoneError())
            self._waiting.clear()

    async def prepare(self) -> PreparedData:
        """Let the runner read the job's rows, once per runner.

        Raises:
            PlutinoError: what the runner met.
        """
        if self._prepared is None:
            command = pb.RunnerCommand(prepare=pb.Prepare(spec_json=self._spec_json))
            events = await self._ask_once(command)
            self._prepared = PreparedData.model_validate_json(events[-1].prepared.json)
        return self._prepared

    async def ask(self, command: pb.RunnerCommand) -> list[pb.RunnerEvent]:
        """Ask until a runner has answered; gives all events of the answer.

        Raises:
            PlutinoError: what the runner met; JobError if no runner comes.
        """
        while True:
            try:
                await self.prepare()
                return await self._ask_once(command)
            except _RunnerGoneError:
                logger.info("the runner went away before it answered; asking the next one")

    def finish(self) -> None:
        """Tell the runner that the job is over."""
        if self._outgoing is not None:
            self._outgoing.put_nowait(pb.RunnerCommand(finish=pb.RunnerFinish()))
            self._outgoing.put_nowait(None)

    async def _ask_once(self, command: pb.RunnerCommand) -> list[pb.RunnerEvent]:
        if not self._attached.is_set():
            self._ensure_running()
            try:
                await asyncio.wait_for(self._attached.wait(), ATTACH_TIMEOUT_S)
            except asyncio.TimeoutError:
                raise JobError(f"no runner came within {ATTACH_TIMEOUT_S:.0f} s; see the coordinator's log") from None
        assert self._outgoing is not None
        request_id = str(next(self._numbers))
        asked = pb.RunnerCommand()
        asked.CopyFrom(command)
        asked.request_id = request_id
        question = _Question(asked, asyncio.get_running_loop().create_future())
        self._waiting[request_id] = question
        self._outgoing.put_nowait(asked)
        try:
            return await question.answer
        finally:
            self._waiting.pop(request_id, None)

    async def _read(
        self, events: AsyncIterator[pb.RunnerEvent], outgoing: asyncio.Queue[pb.RunnerCommand | None]
    ) -> None:
        try:
            async for event in events:
                question = self._waiting.get(event.request_id)
                if question is not None and not question.answer.done():
                    _take(question, event)
        finally:
            outgoing.put_nowait(None)


def _take(question: _Question, event: pb.RunnerEvent) -> None:
    kind = event.WhichOneof("event")
    if kind == "failed":
        question.answer.set_exception(_error_of(event.failed))
        return
    question.parts.append(event)
    if kind != "batch_part" or event.batch_part.last:
        question.answer.set_result(question.parts)


def _error_of(failed: pb.RunnerFailed) -> PlutinoError:
    cls = getattr(errors, failed.error, JobError)
    if not (isinstance(cls, type) and issubclass(cls, PlutinoError)):
        cls = JobError
    return cls(failed.reason)
