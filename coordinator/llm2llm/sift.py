"""Which of a teacher's answers become training rows: a pure fold over the answers in their order."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from coordinator.llm2llm.rouge import KnownTexts
from coordinator.llm2llm.rows import LoopRow, RowShape, objects_in
from plutino.data.formats import BadRowError

NO_ROWS = "no row in the answer"
BAD_ROW = "not of the seed's form"
UNKNOWN_ANSWER = "an answer that no seed row has"
DUPLICATE = "like a known row"
NOT_VERIFIED = "the teacher itself answers otherwise"
SURPLUS = "more than was asked for"
TO_VERIFY = "to be verified"


@dataclass(frozen=True, slots=True)
class Judged:
    """One row of an answer."""

    row: LoopRow | None
    why: str
    """Why it is not kept; empty if it is."""


class Sieve:
    """Knows the seed and all rows that were kept, and judges new ones.

    Args:
        shape: the columns of a row.
        seeds: the seed rows.
        rouge_l: see :class:`plutino.llm2llm.LoopConfig`.
        answers: the only ones that are allowed; empty: any.
        votes: answers that a new row's verification needs; 0: it needs none.
    """

    def __init__(
        self, shape: RowShape, seeds: Sequence[LoopRow], *, rouge_l: float, answers: frozenset[str], votes: int
    ) -> None:
        self._shape = shape
        self._rouge_l = rouge_l
        self._answers = answers
        self._num_votes = votes
        self._known = KnownTexts()
        for seed in seeds:
            self._known.add(seed.question)

    def know(self, row: LoopRow) -> None:
        """Take a row for kept, as an earlier round's."""
        self._known.add(row.question)

    def take(self, text: str, *, room: int, votes: Callable[[str], Sequence[str]]) -> list[Judged]:
        """Judge the rows of one answer.

        Args:
            text: the answer.
            room: rows that are still wanted of this seed row.
            votes: a row's JSON -> what the teacher answered to its question.
        """
        judged: list[Judged] = []
        for values in objects_in(text):
            one = self._judge(values, room, votes)
            if not one.why and one.row is not None:
                room -= 1
                self._known.add(one.row.question)
            judged.append(one)
        return judged or [Judged(None, NO_ROWS)]

    def _judge(self, values: Mapping[str, Any], room: int, votes: Callable[[str], Sequence[str]]) -> Judged:
        try:
            row = self._shape.row(values)
        except BadRowError:
            return Judged(None, BAD_ROW)
        if self._answers and row.answer not in self._answers:
            return Judged(row, UNKNOWN_ANSWER)
        if self._known.has_alike(row.question, self._rouge_l):
            return Judged(row, DUPLICATE)
        if room <= 0:
            return Judged(row, SURPLUS)
        if self._num_votes:
            given = votes(row.json)
            if len(given) < self._num_votes:
                return Judged(row, TO_VERIFY)
            if 2 * sum(same_answer(vote, row.answer) for vote in given) <= len(given):
                return Judged(row, NOT_VERIFIED)
        return Judged(row, "")


def same_answer(first: str, second: str) -> bool:
    """Whether two answers are one: the same text but for case and outer white space, or the same JSON."""
    if first.strip().casefold() == second.strip().casefold():
        return True
    try:
        return bool(json.loads(first) == json.loads(second))
    except (ValueError, RecursionError):
        return False
