"""What the store knows of a loop: the loop itself, every reply of the teacher as it came, and each round's outcome.

All of it is named values of the store, so a loop that is cut off anywhere goes on from its last reply.
"""

from __future__ import annotations

import asyncio
import json
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from coordinator.storage.base import Store
from plutino.errors import UnknownJobError
from plutino.llm2llm import LoopSpec, Sample

_INDEX_KEY = "llm2llm loops"


class LoopRecord(BaseModel):
    """What is stored of a loop."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    loop_id: str
    spec: LoopSpec
    submitted_at_s: float
    attempt: int = 0
    """How often it was resumed: a job that failed is handed in again then."""
    is_cancelled: bool = False
    failure: str = ""
    ended_at_s: float | None = None

    @property
    def state(self) -> str:
        """running, succeeded, failed or cancelled."""
        if self.is_cancelled:
            return "cancelled"
        if self.ended_at_s is None:
            return "running"
        return "failed" if self.failure else "succeeded"


class Kept(BaseModel):
    """A new row."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    seed: int
    """Place of the seed row that it is like."""
    row: dict[str, Any]


class RoundOutcome(BaseModel):
    """What a round came to, once the teacher has been asked."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    wrong: tuple[int, ...]
    """Seed rows that the student got wrong."""
    kept: tuple[Kept, ...]
    asked: int
    failed: int
    rejected: dict[str, int] = Field(default_factory=dict)
    samples: tuple[Sample, ...] = ()
    questions: dict[int, int] = Field(default_factory=dict)
    """Seed row -> questions about it so far, earlier rounds included."""


class StoredReply(BaseModel):
    """One reply of the teacher."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    text: str | None
    error: str = ""


class LoopRecords:
    """Reads and writes them."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def ids(self) -> list[str]:
        """All loops, oldest first."""
        return list(json.loads(self._store.value(_INDEX_KEY) or "[]"))

    def find(self, text: str) -> str:
        """The id of the loop with this id, or of the only one whose id starts so.

        Raises:
            UnknownJobError: none, or several.
        """
        ids = self.ids()
        found = [text] if text in ids else [loop_id for loop_id in ids if loop_id.startswith(text)]
        if len(found) != 1:
            known = ", ".join((found or ids)[-5:]) or "there are no loops"
            raise UnknownJobError(f"{'several loops begin with' if found else 'no loop'} {text!r}: {known}")
        return found[0]

    def submitted_as(self, key: str) -> str | None:
        """The loop that was handed in with this key."""
        return self._store.value(f"loop submitted as {key}") if key else None

    async def add(self, record: LoopRecord, key: str) -> None:
        """Store a new loop."""
        await self.save(record)
        # After the loop itself: an index must not name one that is not there.
        await self._put(_INDEX_KEY, json.dumps([*self.ids(), record.loop_id]))
        if key:
            await self._put(f"loop submitted as {key}", record.loop_id)

    def get(self, loop_id: str) -> LoopRecord:
        """A loop by its whole id.

        Raises:
            UnknownJobError: there is none.
        """
        text = self._store.value(f"loop {loop_id}")
        if text is None:
            raise UnknownJobError(f"no loop {loop_id!r}")
        return LoopRecord.model_validate_json(text)

    async def save(self, record: LoopRecord) -> None:
        """Write a loop's record."""
        await self._put(f"loop {record.loop_id}", record.model_dump_json())

    def outcome(self, loop_id: str, number: int) -> RoundOutcome | None:
        """A round's outcome; None before it has one."""
        text = self._store.value(f"loop {loop_id} round {number}")
        return None if text is None else RoundOutcome.model_validate_json(text)

    async def put_outcome(self, loop_id: str, number: int, outcome: RoundOutcome) -> None:
        """Write a round's outcome."""
        await self._put(f"loop {loop_id} round {number}", outcome.model_dump_json())

    def reply(self, loop_id: str, key: str) -> StoredReply | None:
        """A reply by its question's name; None if there is none yet."""
        text = self._store.value(f"loop {loop_id} reply {key}")
        return None if text is None else StoredReply.model_validate_json(text)

    async def put_reply(self, loop_id: str, key: str, reply: StoredReply) -> None:
        """Write a reply."""
        await self._put(f"loop {loop_id} reply {key}", reply.model_dump_json())

    async def _put(self, key: str, value: str) -> None:
        await asyncio.wrap_future(self._store.put_value(key, value))
