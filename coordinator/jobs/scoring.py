"""How good generated answers are: pure comparisons of texts.

Entry point: :func:`score`. ``exact_match`` suits short answers; ``json_slots`` suits answers of the form
``{"intent": ..., "slots": {name: text or list of texts}}`` and counts what is right in part.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from plutino.data.readers import name_lines
from plutino.errors import DataError
from plutino.job.objective_part import MetricName


class Score(BaseModel):
    """The score of one set of rows; what its metric does not measure is None."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    metric: MetricName
    num_rows: int
    exact_match: float | None = None
    """Share of answers equal to the true ones but for outer white space; for json_slots, equal as JSON values."""
    valid_json: float | None = None
    """json_slots: answers that parse as an object with an intent and slots."""
    intent_accuracy: float | None = None
    """json_slots: answers with the true intent; one that does not parse has none."""
    slot_f1: float | None = None
    """json_slots: micro-averaged F1 over (slot, text) pairs of all rows, each pair as often as it occurs."""

    accuracy: float | None = None
    """classes: rows whose class has the largest logit."""
    macro_f1: float | None = None
    """classes: mean F1 over the classes."""
    pearson: float | None = None
    spearman: float | None = None
    mse: float | None = None
    """correlation: mean squared error."""
    pair_accuracy: float | None = None
    """pairs: share in which the chosen answer is above the rejected one."""
    margin: float | None = None
    """pairs: mean difference of the two, in the objective's rewards."""
    auc: float | None = None
    """ratings: area under the ROC curve for answers rated above the middle."""
    perplexity: float | None = None
    """exp of the mean loss per label token."""

    @property
    def values(self) -> dict[str, float]:
        """What was measured, by name."""
        return self.model_dump(exclude={"metric", "num_rows"}, exclude_none=True)

    @property
    def headline(self) -> float:
        """The one number of this metric: slot F1 where there is one, else the first that it measures."""
        return next(iter(self.values.values())) if self.slot_f1 is None else self.slot_f1

    @property
    def headline_text(self) -> str:
        """As people read it."""
        return value_text("slot_f1" if self.slot_f1 is not None else next(iter(self.values)), self.headline)


class ScoredSample(BaseModel):
    """One held-out row as people see it."""

    model_config = ConfigDict(frozen=True)

    prompt: str
    answer: str
    truth: str


class RowVerdict(BaseModel):
    """What came of one held-out row."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    row: int
    """Its place among the task's held-out rows."""
    is_right: bool
    answer: str
    """Generated text, or the name of a class."""


class ScoreReport(BaseModel):
    """A score and the first rows behind it."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)

    score: Score
    """Of the first task."""
    samples: tuple[ScoredSample, ...]
    """The first rows that were answered, in their order; all of them with scoring.keep_answers."""
    by_task: dict[str, Score] = Field(default_factory=dict)
    """Of all tasks, where there are several."""
    rows: dict[str, tuple[RowVerdict, ...]] = Field(default_factory=dict)
    """Every row of the tasks that tell right from wrong, by task, where scoring.keep_answers asks for it."""

    @property
    def num_rows(self) -> int:
        """Held-out rows of all tasks."""
        return sum(one.num_rows for one in self.by_task.values()) if self.by_task else self.score.num_rows

    @property
    def values(self) -> dict[str, float]:
        """Everything that was measured, by name, with the task's before it where there are several."""
        if not self.by_task:
            return self.score.values
        return {f"{task} {name}": value for task, one in self.by_task.items() for name, value in one.values.items()}

    @property
    def share(self) -> float | None:
        """One number between 0 and 1, the higher the better; of several tasks their mean.

        None: a task has no such share, as perplexity and correlation are none.
        """
        tasks = [*self.by_task.values()] or [self.score]
        # Of ratings the rank correlation comes first, and the area under the curve is the share.
        own = [next((v for name, v in task.values.items() if name in SHARES), None) for task in tasks]
        shares = [
            one if task.slot_f1 is None else task.slot_f1
            for task, one in zip(tasks, own, strict=True)
            if one is not None
        ]
        return sum(shares) / len(tasks) if len(shares) == len(tasks) else None


SHARES = frozenset(
    {"exact_match", "valid_json", "intent_accuracy", "slot_f1", "accuracy", "macro_f1", "pair_accuracy", "auc"}
)
"""Values between 0 and 1 that people read in per cent."""


def value_text(name: str, value: float) -> str:
    """A measured value as people read it; the name may begin with a task's."""
    return f"{value:.1%}" if name.rpartition(" ")[2] in SHARES else f"{value:.4g}"


def score(metric: MetricName, answers: Sequence[str], truths: Sequence[str]) -> Score:
    """Compare generated answers with the true ones, row by row.

    Raises:
        ValueError: there are no rows, or the two differ in number.
        DataError: json_slots, and true answers are not of its form.
    """
    if not truths or len(answers) != len(truths):
        raise ValueError(f"{len(answers)} answers for {len(truths)} rows")
    if metric == "json_slots":
        return _json_slots(answers, truths)
    assert metric == "exact_match", f"{metric} is not made of answers"
    num_right = sum(answer.strip() == truth.strip() for answer, truth in zip(answers, truths, strict=True))
    return Score(metric=metric, num_rows=len(truths), exact_match=num_right / len(truths))


def is_right(metric: MetricName, answer: str, truth: str) -> bool:
    """Whether one generated answer is right in full."""
    if metric == "json_slots":
        return _parse(answer) is not None and _parse(answer) == _parse(truth)
    return answer.strip() == truth.strip()


@dataclass(frozen=True, slots=True)
class _Frame:
    intent: str
    slots: Counter[tuple[str, str]]


def _json_slots(answers: Sequence[str], truths: Sequence[str]) -> Score:
    expected = [_parse(truth) for truth in truths]
    unusable = [position for position, frame in enumerate(expected, start=1) if frame is None]
    if unusable:
        raise DataError(
            f'json_slots needs true answers like {{"intent": ..., "slots": {{...}}}}; held-out rows, counted from 1: '
            f"{name_lines(unusable).removeprefix('lines ').removeprefix('line ')}; mend them or use metric exact_match"
        )
    given = [_parse(answer) for answer in answers]
    num_exact = num_intents = num_common = num_given = num_expected = 0
    for frame, true_frame in zip(given, expected, strict=True):
        assert true_frame is not None
        num_expected += true_frame.slots.total()
        if frame is None:
            continue
        num_exact += frame == true_frame
        num_intents += frame.intent == true_frame.intent
        num_given += frame.slots.total()
        num_common += (frame.slots & true_frame.slots).total()
    num_rows = len(truths)
    return Score(
        metric="json_slots",
        num_rows=num_rows,
        exact_match=num_exact / num_rows,
        valid_json=sum(frame is not None for frame in given) / num_rows,
        intent_accuracy=num_intents / num_rows,
        # Nothing to find and nothing found is right.
        slot_f1=2 * num_common / (num_given + num_expected) if num_given + num_expected else 1.0,
    )


def _parse(text: str) -> _Frame | None:
    """Intent and slots of an answer, or None if it is not of that form."""
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(values, dict) or not isinstance(values.get("intent"), str):
        return None
    slots = values.get("slots")
    if not isinstance(slots, dict):
        return None
    pairs = [(name, text) for name, value in slots.items() for text in _as_list(value)]
    if not all(isinstance(text, str) for _, text in pairs):
        return None
    return _Frame(values["intent"].strip(), Counter((name.strip(), text.strip()) for name, text in pairs))


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]
