"""One round's questions to the teacher: wave after wave, every reply stored as it comes, until rows are enough."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from coordinator.llm2llm.asking import ask_for_answer, ask_for_rows
from coordinator.llm2llm.records import Kept, LoopRecords, RoundOutcome, StoredReply
from coordinator.llm2llm.rows import LoopRow, RowShape
from coordinator.llm2llm.sift import TO_VERIFY, Judged, Sieve
from coordinator.llm2llm.teachers.base import Ask, Reply, TeacherHandle
from plutino.errors import JobError
from plutino.llm2llm import LoopConfig, Sample


@dataclass(frozen=True, slots=True, kw_only=True)
class Seeds:
    """What a loop starts from."""

    shape: RowShape
    rows: tuple[LoopRow, ...]
    answers: frozenset[str]
    """The only ones that new rows may have; empty: any."""


@dataclass(slots=True)
class _Wave:
    """What is known of a round after some of its replies."""

    kept: dict[int, list[LoopRow]] = field(default_factory=dict)
    judged: list[tuple[int, Judged]] = field(default_factory=list)
    asked: int = 0
    failed: int = 0


class RoundQuestions:
    """Asks for rows like those that the student got wrong.

    Args:
        records: where replies are stored.
        loop_id: the loop.
        number: the round.
        config: how the loop goes.
        seeds: its seed.
        earlier: outcomes of the rounds before.
    """

    def __init__(
        self,
        records: LoopRecords,
        loop_id: str,
        number: int,
        config: LoopConfig,
        seeds: Seeds,
        earlier: Sequence[RoundOutcome],
    ) -> None:
        self._records = records
        self._loop_id = loop_id
        self._number = number
        self._config = config
        self._seeds = seeds
        self._earlier = earlier
        self._questions: Counter[int] = Counter(earlier[-1].questions if earlier else {})

    async def run(self, teacher: TeacherHandle, wrong: Sequence[int]) -> RoundOutcome:
        """Ask until every wrong row has its new ones, or has been asked about often enough.

        Raises:
            PlutinoError: the teacher cannot be asked, or all of the first wave's questions failed.
        """
        waves = 0
        while waves < self._config.asks and (short := self._short(self._fold(waves, wrong), wrong)):
            await self._ask_wave(teacher, waves, self._fold(waves, wrong), short)
            waves += 1
            await self._verify(teacher, waves, wrong)
        return self._outcome(self._fold(waves, wrong), wrong, waves)

    def _short(self, seen: _Wave, wrong: Sequence[int]) -> list[int]:
        return [seed for seed in wrong if len(seen.kept.get(seed, ())) < self._config.samples_per_wrong]

    async def _ask_wave(self, teacher: TeacherHandle, wave: int, seen: _Wave, short: Sequence[int]) -> None:
        num_before = Counter(
            seed for earlier in range(wave) for seed in short if self._reply_of(earlier, seed) is not None
        )
        asks = [
            Ask(
                key=self._key(wave, seed),
                turns=ask_for_rows(
                    self._seeds.shape,
                    self._seeds.rows[seed],
                    num_rows=self._config.samples_per_wrong - len(seen.kept.get(seed, ())),
                    given=[row.json for row in self._of_seed(seed, seen)],
                    answers=sorted(self._seeds.answers),
                    instructions=self._config.instructions,
                ),
                seed_json=self._seeds.rows[seed].json,
                number=self._questions[seed] + num_before[seed],
            )
            for seed in short
        ]
        await self._ask(teacher, asks, is_first=wave == 0)

    def _of_seed(self, seed: int, seen: _Wave) -> list[LoopRow]:
        """New rows that there are of a seed row already; the teacher is shown them and asked for others."""
        earlier = [one.row for outcome in self._earlier for one in outcome.kept if one.seed == seed]
        return [*(self._seeds.shape.row(row) for row in earlier), *seen.kept.get(seed, ())]

    async def _ask(self, teacher: TeacherHandle, asks: Sequence[Ask], *, is_first: bool = False) -> None:
        """Ask what has no reply yet; of the round's first questions one at least must be answered."""
        left = [ask for ask in asks if self._records.reply(self._loop_id, ask.key) is None]
        num_answered = len(asks) - len(left)
        failures: list[tuple[Ask, Reply]] = []

        async def take(ask: Ask, reply: Reply) -> None:
            nonlocal num_answered
            if reply.text is None:
                failures.append((ask, reply))
                return
            await self._records.put_reply(self._loop_id, ask.key, StoredReply(text=reply.text))
            num_answered += 1

        if left:
            await teacher.answer(left, take)
        if is_first and failures and not num_answered:
            # A teacher that is away must not use the round up: nothing of this is stored, and all is asked again.
            raise JobError(
                f"the teacher answered none of {len(asks)} questions, the first failure: {failures[0][1].error}; "
                "see to it, then resume the loop"
            )
        for ask, reply in failures:
            await self._records.put_reply(self._loop_id, ask.key, StoredReply(text=None, error=reply.error))

    async def _verify(self, teacher: TeacherHandle, waves: int, wrong: Sequence[int]) -> None:
        """Ask the questions of rows that are otherwise fit."""
        if not self._config.verify_votes:
            return
        asks = [
            Ask(
                key=self._vote_key(judged.row, vote),
                turns=ask_for_answer(self._seeds.rows[seed], judged.row),
                seed_json=judged.row.json,
                number=vote,
            )
            for seed, judged in self._fold(waves, wrong).judged
            if judged.why == TO_VERIFY and judged.row is not None
            for vote in range(self._config.verify_votes)
        ]
        await self._ask(teacher, list({ask.key: ask for ask in asks}.values()))

    def _fold(self, waves: int, wrong: Sequence[int]) -> _Wave:
        """Judge all replies of the round so far, always in the same order."""
        sieve = Sieve(
            self._seeds.shape,
            self._seeds.rows,
            rouge_l=self._config.rouge_l,
            answers=self._seeds.answers,
            votes=self._config.verify_votes,
        )
        for outcome in self._earlier:
            for one in outcome.kept:
                sieve.know(self._seeds.shape.row(one.row))
        seen = _Wave()
        for wave in range(waves):
            for seed in self._short(seen, wrong):
                reply = self._reply_of(wave, seed)
                if reply is None:
                    continue
                seen.asked += 1
                if reply.text is None:
                    seen.failed += 1
                    continue
                room = self._config.samples_per_wrong - len(seen.kept.get(seed, ()))
                for judged in sieve.take(reply.text, room=room, votes=self._votes_of):
                    seen.judged.append((seed, judged))
                    if judged.row is not None and not judged.why:
                        seen.kept.setdefault(seed, []).append(judged.row)
        return seen

    def _outcome(self, seen: _Wave, wrong: Sequence[int], waves: int) -> RoundOutcome:
        for wave in range(waves):
            self._questions.update(seed for seed in wrong if self._reply_of(wave, seed) is not None)
        return RoundOutcome(
            wrong=tuple(wrong),
            kept=tuple(Kept(seed=seed, row=row.values) for seed, rows in seen.kept.items() for row in rows),
            asked=seen.asked,
            failed=seen.failed,
            rejected=dict(Counter(judged.why for _, judged in seen.judged if judged.why)),
            samples=tuple(
                Sample(
                    round=self._number,
                    seed_line=self._seeds.rows[seed].line_number,
                    row=None if judged.row is None else judged.row.values,
                    kept=not judged.why,
                    why=judged.why,
                )
                for seed, judged in seen.judged
            ),
            questions=dict(self._questions),
        )

    def _votes_of(self, row_json: str) -> list[str]:
        """What the teacher answered to a new row's question."""
        return [
            reply.text or ""
            for vote in range(self._config.verify_votes)
            if (reply := self._records.reply(self._loop_id, _vote_name(self._number, row_json, vote))) is not None
        ]

    def _reply_of(self, wave: int, seed: int) -> StoredReply | None:
        return self._records.reply(self._loop_id, self._key(wave, seed))

    def _key(self, wave: int, seed: int) -> str:
        return f"{self._number}/{wave}/{seed}"

    def _vote_key(self, row: LoopRow, vote: int) -> str:
        return _vote_name(self._number, row.json, vote)


def _vote_name(number: int, row_json: str, vote: int) -> str:
    return f"{number}/vote/{hashlib.sha256(row_json.encode()).hexdigest()[:16]}/{vote}"
