"""What the job optimises.

What planner and coordinator ask of an objective they ask of its config, by the properties of
:class:`plutino.job.objective_part.ObjectivePart`; what it computes stands in ``edge_node/objectives``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import Field, model_validator

from plutino.job.objective_part import Counted, MetricName, ObjectivePart, RowUse, TrainOn
from plutino.job.rewards import AdapterReward, ExactMatchReward, RewardSource

_COUNTED: Mapping[str, Counted] = {
    "tokens": "label tokens",
    "roots": "roots of label tokens",
    "rows": "labelled rows",
}


class _LabelTokens(ObjectivePart):
    mean_over: Literal["tokens", "roots", "rows"] = "tokens"
    """tokens: every label token of a step weighs the same, so that a row counts by its length. rows: every row weighs
    the same, and its label tokens (those of all its turns together) share that. roots: between the two, a row weighs
    the square root of its number of label tokens (square averaging in InternVL 2.5, Chen et al. 2024,
    arXiv:2412.05271). Perplexities are per token in any case."""

    @property
    def counted(self) -> Counted:
        """See :class:`ObjectivePart`."""
        return _COUNTED[self.mean_over]


class SftConfig(_LabelTokens):
    """Supervised fine-tuning: cross-entropy on the answer's tokens."""

    type: Literal["sft"] = "sft"
    train_on: TrainOn = "answers"
    """answers: whatever the assistant (the completion) says carries loss. last: only its last turn. all: every
    token."""

    @property
    def labelled_tokens(self) -> TrainOn:
        """See :class:`ObjectivePart`."""
        return self.train_on


class Seq2SeqConfig(_LabelTokens):
    """An encoder-decoder writes the completion of the prompt that it has read.

    Prompt and completion share data.max_tokens: of one that is longer a completion keeps half of them at most, and the
    prompt is cut to what is left.
    """

    type: Literal["seq2seq"] = "seq2seq"

    @property
    def row_use(self) -> RowUse:
        """See :class:`ObjectivePart`."""
        return "source_target"


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
    @property
    def counted(self) -> Counted:
        """See :class:`ObjectivePart`."""
        return "rows"

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
    def counted(self) -> Counted:
        """See :class:`ObjectivePart`."""
        return "rows"

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


class GrpoConfig(ObjectivePart):
    """Group relative policy optimisation (Shao et al. 2024, arXiv:2402.03300).

    To every prompt the model samples several answers; those with a higher reward than the others of their group become
    likelier. The reference is the same pipeline with its adapter switched off. On held-out rows the loss is that of
    supervised fine-tuning.
    """

    type: Literal["grpo"] = "grpo"
    rewards: tuple[RewardSource, ...] = Field((ExactMatchReward(),), min_length=1)
    """Where rewards come from; their weighted sum counts."""
    answers: int = Field(8, ge=2)
    """Answers to each prompt: a group."""
    max_new_tokens: int = Field(64, ge=1)
    temperature: float = Field(1.0, gt=0)
    """Of sampling; log-probabilities are taken at the same one."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Sample among the likeliest tokens that have this share together; 1 leaves nothing out."""
    beta: float = Field(0.04, ge=0)
    """Weight of the KL divergence from the base model (Schulman's k3 estimate of it); 0 runs no reference."""
    clip: float = Field(0.2, gt=0, lt=1)
    """A token's probability ratio counts down to 1 - clip and up to 1 + clip."""
    clip_high: float | None = Field(None, gt=0)
    """Another bound above, as in DAPO (Yu et al. 2025, arXiv:2503.14476); None: as below."""
    updates: int = Field(1, ge=1)
    """Optimiser steps on the same answers."""
    loss: Literal["grpo", "dapo", "dr_grpo"] = "grpo"
    """grpo: mean over answers of the mean over their tokens. dapo: mean over all tokens of the step. dr_grpo: sum over
    tokens by max_new_tokens, mean over answers (Liu et al. 2025, arXiv:2503.20783)."""
    scale: Literal["group", "batch", "none"] = "group"
    """What a reward's distance from its group's mean is divided by: the standard deviation of the group, of all
    rewards of the step, or nothing."""
    group_rows: int = Field(16, ge=1)
    """Sequences that are generated together; as many such groups as stages are under way at once."""

    @property
    def runs_reference(self) -> bool:
        """See :class:`ObjectivePart`."""
        return self.beta > 0

    @property
    def answers_per_row(self) -> int:
        """See :class:`ObjectivePart`."""
        return self.answers

    @property
    def generated_rows(self) -> int:
        """See :class:`ObjectivePart`."""
        return self.group_rows

    @property
    def generated_tokens(self) -> int:
        """See :class:`ObjectivePart`."""
        return self.max_new_tokens

    @property
    def reward_adapters(self) -> tuple[AdapterReward, ...]:
        """Sources that run through the pipeline."""
        return tuple(source for source in self.rewards if isinstance(source, AdapterReward))

    def first_step_of(self, step: int) -> int:
        """The first step that learns from the same answers as this one."""
        return step - step % self.updates

    @model_validator(mode="after")
    def _one_reward_adapter(self) -> GrpoConfig:
        if len(self.reward_adapters) > 1:
            raise ValueError("rewards: one reward adapter runs beside the policy; give one, with other sources beside")
        return self


ObjectiveConfig = Annotated[
    SftConfig
    | Seq2SeqConfig
    | DaptConfig
    | ClassificationConfig
    | RegressionConfig
    | RewardConfig
    | DpoConfig
    | GrpoConfig,
    Field(discriminator="type"),
]
"""Union of all objectives' configs, told apart by ``type``."""
