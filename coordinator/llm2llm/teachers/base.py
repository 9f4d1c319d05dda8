"""What a teacher is."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Turn:
    """One message to the teacher."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Ask:
    """One question."""

    key: str
    """Names it among all of a loop."""
    turns: tuple[Turn, ...]
    seed_json: str
    """The seed row that it is about."""
    number: int
    """How many questions about this seed row came before."""


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer, or why there is none."""

    text: str | None
    error: str = ""


Take = Callable[[Ask, Reply], Awaitable[None]]
"""Called with each reply as it comes; returns once it is durable."""


class TeacherHandle(Protocol):
    """Answers questions."""

    async def answer(self, asks: Sequence[Ask], take: Take) -> None:
        """Hand each question's reply to ``take``. A question that fails gives a reply with its reason.

        Raises:
            PlutinoError: no question of this teacher can be answered at all.
        """
