"""Answers from a file: for tests, for demonstrations, and to run a loop again without its teacher."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from coordinator.llm2llm.teachers.base import Ask, Reply, Take
from plutino.errors import DataError
from plutino.llm2llm import RecordedTeacher


class RecordedAnswers:
    """Implements :class:`coordinator.llm2llm.teachers.base.TeacherHandle`.

    Raises:
        DataError: the file cannot be read, or a line of it is none of ours.
    """

    def __init__(self, config: RecordedTeacher) -> None:
        self._replies: dict[str, list[str]] = {}
        try:
            lines = Path(config.path).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"cannot read the recorded answers {config.path}: {error}") from error
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                values = json.loads(line)
                row, reply = values["row"], values["reply"]
            except (ValueError, KeyError, TypeError) as error:
                raise DataError(
                    f'{config.path}, line {number}: not {{"row": ..., "reply": ...}}; mend or remove it'
                ) from error
            key = json.dumps(row, ensure_ascii=False, sort_keys=True)
            self._replies.setdefault(key, []).append(str(reply))

    async def answer(self, asks: Sequence[Ask], take: Take) -> None:
        """See :class:`coordinator.llm2llm.teachers.base.TeacherHandle`."""
        for ask in asks:
            known = self._replies.get(ask.seed_json, [])
            missing = f"{len(known)} answers are recorded for this row, and this is question {ask.number + 1}"
            await take(ask, Reply(known[ask.number]) if ask.number < len(known) else Reply(None, missing))
