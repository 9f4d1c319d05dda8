"""What the teacher is asked, in words. It sees seed rows and what was made of them, and nothing else of the data."""

from __future__ import annotations

from collections.abc import Sequence

from coordinator.llm2llm.rows import LoopRow, RowShape
from coordinator.llm2llm.teachers.base import Turn

_MOST_ANSWERS_NAMED = 60

_RULES = """You write training examples for a student model. You are shown one example that the student got wrong.
Write new examples of the same task and of similar difficulty: other names, numbers, topics and wording.
Every example must be complete and its answer correct.
Reply with JSON objects alone, one on each line, each with exactly these keys: {keys}."""

_VERIFY = """You answer questions. Reply with the answer alone, in the form that the example has."""


def ask_for_rows(
    shape: RowShape, seed: LoopRow, *, num_rows: int, given: Sequence[str], answers: Sequence[str], instructions: str
) -> tuple[Turn, ...]:
    """Ask for rows like a seed row.

    Args:
        shape: the columns that new rows must have.
        seed: the row that the student got wrong.
        num_rows: how many new ones.
        given: rows, as JSON, that came of it before: others are wanted.
        answers: the only ones that are allowed; empty: any.
        instructions: the person's own words.
    """
    rules = [_RULES.format(keys=", ".join(f'"{key}"' for key in shape.keys))]
    if 0 < len(answers) <= _MOST_ANSWERS_NAMED:
        rules.append(f"The answer must be one of: {', '.join(answers)}.")
    if instructions:
        rules.append(instructions)
    task = [f"Example:\n{seed.json}", f"Write {num_rows} new example{'s' if num_rows > 1 else ''}."]
    if given:
        task.insert(1, "These are known already; write different ones:\n" + "\n".join(given))
    return (Turn("system", "\n".join(rules)), Turn("user", "\n\n".join(task)))


def ask_for_answer(seed: LoopRow, row: LoopRow) -> tuple[Turn, ...]:
    """Ask a new row's own question, with the seed row as an example."""
    text = f"Question:\n{seed.prompt}\nAnswer:\n{seed.answer}\n\nQuestion:\n{row.prompt}\nAnswer:"
    return (Turn("system", _VERIFY), Turn("user", text))
