"""What the job optimises.

What planner and coordinator ask of an objective they ask of its config, by the properties of :class:`ObjectivePart`;
what it computes stands in ``edge_node/objectives``.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from plutino.job.base import SpecPart

Counted = Literal["label tokens", "rows"]
"""What a loss is the mean over: the step's label tokens, or its rows (a preference pair is one row)."""

RowUse = Literal["answers", "text", "label", "scored", "pairs"]
"""What an objective takes of a row: answers to learn, raw text, text with a label, a rated answer, two answers."""

TrainOn = Literal["answers", "last", "all"]
"""Which tokens of a conversation carry loss: all answers, only the last one, or all tokens."""

MetricName = Literal["exact_match", "json_slots", "perplexity", "classes", "correlation", "pairs", "ratings"]
"""How held-out rows are scored."""

GENERATED_METRICS: tuple[MetricName, ...] = ("exact_match", "json_slots")
"""Metrics that compare generated answers."""


class ObjectivePart(SpecPart):
    """What is asked of every objective's config."""

    counted: ClassVar[Counted] = "label tokens"

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


class SftConfig(ObjectivePart):
    """Supervised fine-tuning: cross-entropy on the answer's tokens."""

    type: Literal["sft"] = "sft"
    train_on: TrainOn = "answers"
    """answers: whatever the assistant (the completion) says carries loss. last: only its last turn. all: every
    token."""

    @property
    def labelled_tokens(self) -> TrainOn:
        """See :class:`ObjectivePart`."""
        return self.train_on


class DaptConfig(ObjectivePart):
    """Domain-adaptive pre-training on raw text (Gururangan et al. 2020, arXiv:2004.10964): every token carries loss.

    Documents longer than data.max_tokens are cut into pieces; short ones share a sequence (data.packing) without
    seeing each other.
    """

    type: Literal["dapt"] = "dapt"

    @property
    def own_metric(self) -> MetricName:
        """See :class:`ObjectivePart`."""
        return "perplexity"

    @property
    def row_use(self) -> RowUse:
        """See :class:`ObjectivePart`."""
        return "text"


class _ScoreHead(ObjectivePart):
    counted: ClassVar[Counted] = "rows"

    @property
    def has_score_head(self) -> bool:
        """See :class:`ObjectivePart`."""
        return True

    @property
    def num_outputs(self) -> int:
        """See :class:`ObjectivePart`."""
        return 1


class ClassificationConfig(_ScoreHead):
    """Cross-entropy over classes, from a head on the last token."""

    type: Literal["classification"] = "classification"
    labels: tuple[str, ...] = ()
    """The classes in the order of the head's outputs; empty: those of the training rows, sorted."""

    @model_validator(mode="after")
    def _labels_differ(self) -> ClassificationConfig:
        if len(set(self.labels)) != len(self.labels):
            raise ValueError("labels: a class is named twice")
        if len(self.labels) == 1:
            raise ValueError("labels: one class leaves nothing to tell apart; name two or more, or none")
        return self

    @property
    def own_metric(self) -> MetricName:
        """See :class:`ObjectivePart`."""
        return "classes"

    @property
    def row_use(self) -> RowUse:
        """See :class:`ObjectivePart`."""
        return "label"

    def with_class_names(self, names: tuple[str, ...]) -> ClassificationConfig:
        """See :class:`ObjectivePart`."""
        return self.model_copy(update={"labels": names})

    @property
    def num_outputs(self) -> int:
        """See :class:`ObjectivePart`."""
        return len(self.labels)


class RegressionConfig(_ScoreHead):
    """Mean squared error of a number, from a head on the last token."""

    type: Literal["regression"] = "regression"

    @property
    def own_metric(self) -> MetricName:
        """See :class:`ObjectivePart`."""
        return "correlation"

    @property
    def row_use(self) -> RowUse:
        """See :class:`ObjectivePart`."""
        return "label"


class RewardConfig(_ScoreHead):
    """A reward model, from a head on the last token of prompt and answer."""

    type: Literal["reward"] = "reward"
    labels: Literal["pairs", "ratings"] = "pairs"
    """pairs: the chosen answer's reward above the rejected one's (Bradley and Terry 1952; Ouyang et al. 2022,
    arXiv:2203.02155). ratings: a number for each answer."""
    rating_loss: Literal["bce", "mse"] = "bce"
    """For ratings. bce: ratings between 0 and 1 as probabilities of the reward's sigmoid. mse: any numbers."""
    center_coefficient: float = Field(0.0, ge=0)
    """For pairs: adds this times the squared sum of both rewards, which pulls their mean to 0 (Eisenstein et al. 2023,
    arXiv:2312.09244)."""

    @property
    def own_metric(self) -> MetricName:
        """See :class:`ObjectivePart`."""
        return "pairs" if self.labels == "pairs" else "ratings"

    @property
    def row_use(self) -> RowUse:
        """See :class:`ObjectivePart`."""
        return "pairs" if self.labels == "pairs" else "scored"


class DpoConfig(ObjectivePart):
    """Direct preference optimisation (Rafailov et al. 2023, arXiv:2305.18290).

    The reference is the same pipeline with its adapter switched off.
    """

    counted: ClassVar[Counted] = "rows"

    type: Literal["dpo"] = "dpo"
    beta: float = Field(0.1, gt=0)
    """How hard the policy is held to the reference."""
    loss: Literal["sigmoid", "ipo", "hinge"] = "sigmoid"
    """sigmoid: DPO's own. ipo: squared distance from 1 / (2 beta) (Azar et al. 2023, arXiv:2310.12036). hinge: SLiC's
    (Zhao et al. 2023, arXiv:2305.10425)."""
    label_smoothing: float = Field(0.0, ge=0, lt=0.5)
    """For sigmoid: the share of pairs that are thought to be labelled the wrong way round (Mitchell 2023)."""
    average_logps: bool = False
    """Mean instead of sum of an answer's token log-probabilities, so that length does not count."""
    reference: Literal["base", "rows"] = "base"
    """base: run the base in every step. rows: take reference_chosen_logps and reference_rejected_logps of the rows."""

    @model_validator(mode="after")
    def _smoothing_is_for_sigmoid(self) -> DpoConfig:
        if self.label_smoothing and self.loss != "sigmoid":
            raise ValueError(f"label_smoothing is defined for loss: sigmoid, not for {self.loss}; leave it out")
        return self

    @property
    def own_metric(self) -> MetricName:
        """See :class:`ObjectivePart`."""
        return "pairs"

    @property
    def row_use(self) -> RowUse:
        """See :class:`ObjectivePart`."""
        return "pairs"

    @property
    def runs_reference(self) -> bool:
        """See :class:`ObjectivePart`."""
        return self.reference == "base"


ObjectiveConfig = Annotated[
    SftConfig | DaptConfig | ClassificationConfig | RegressionConfig | RewardConfig | DpoConfig,
    Field(discriminator="type"),
]
"""Union of all objectives' configs, told apart by ``type``."""
