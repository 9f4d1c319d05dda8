"""What is asked of every objective's config, and the words for it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from plutino.job.base import SpecPart

Counted = Literal["label tokens", "roots of label tokens", "labelled rows", "rows"]
"""What a loss is the mean over: the step's label tokens; its rows, weighing the square roots of their numbers of label
tokens; its rows that have label tokens, all weighing the same; or its rows, each with a loss of its own (a preference
pair is one row)."""

LENGTH_DISCOUNTS: Mapping[Counted, float] = {"roots of label tokens": 0.5, "labelled rows": 1.0}
"""A label token of a row with n of them counts by n ** -discount, the row by n ** (1 - discount); 0 of the others."""

RowUse = Literal["answers", "source_target", "text", "label", "scored", "pairs"]
"""What an objective takes of a row: answers to learn, a text with what is to be written of it, raw text, text with a
label, a rated answer, two answers."""

TrainOn = Literal["answers", "last", "all"]
"""Which tokens of a conversation carry loss: all answers, only the last one, or all tokens."""

MetricName = Literal["exact_match", "json_slots", "perplexity", "classes", "correlation", "pairs", "ratings"]
"""How held-out rows are scored."""

GENERATED_METRICS: tuple[MetricName, ...] = ("exact_match", "json_slots")
"""Metrics that compare generated answers."""


class ObjectivePart(SpecPart):
    """What is asked of every objective's config."""

    @property
    def counted(self) -> Counted:
        """What the loss is the mean over."""
        return "label tokens"

    @property
    def own_metric(self) -> MetricName:
        """The metric that scoring takes where the job names none."""
        return "exact_match"

    @property
    def row_use(self) -> RowUse:
        """What of a row is used."""
        return "answers"

    @property
    def sequences_per_row(self) -> int:
        """Sequences that one row sends through the pipeline, always in one micro-batch: 2 for preference pairs."""
        return 2 if self.row_use == "pairs" else 1

    @property
    def has_score_head(self) -> bool:
        """Whether a trained linear head on the last token takes the place of the model's own head."""
        return False

    @property
    def num_outputs(self) -> int:
        """Outputs of the score head; 0 without one, or while its classes are not known yet."""
        return 0

    def with_class_names(self, names: tuple[str, ...]) -> ObjectivePart:
        """The config for devices, which have not seen the data; itself if it tells no classes apart."""
        return self

    @property
    def runs_reference(self) -> bool:
        """Whether each step first runs all its rows through the model with its adapter switched off."""
        return False

    @property
    def labelled_tokens(self) -> TrainOn:
        """Which tokens of a conversation carry loss."""
        return "answers"

    @property
    def answers_per_row(self) -> int:
        """Answers that the model samples to a row, each a sequence of a step; 1: it learns from the rows' own."""
        return 1

    @property
    def generated_rows(self) -> int:
        """Most sequences that are generated together; 0: steps generate nothing."""
        return 0

    @property
    def generated_tokens(self) -> int:
        """Most tokens of an answer that is generated for a step."""
        return 0
