"""What fine-tuning did beside the job's own goal.

Perplexity on general text before and after it, and the base model with examples in its prompt in place of it.
"""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Mapping

from pydantic import BaseModel, ConfigDict

from coordinator.jobs.context import JobContext
from coordinator.jobs.prepared import PreparedData
from coordinator.jobs.scoring import Score, ScoreReport
from coordinator.jobs.units import evaluate, score
from coordinator.storage.base import ScoringMoment
from plutino.events import Notice


class GeneralAbility(BaseModel):
    """How well the model predicts general text."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    loss: float
    """Mean over the scored tokens, in nats."""
    num_tokens: int
    text_sha256: str

    @property
    def perplexity(self) -> float:
        """Exp of the loss; infinite where that is too large."""
        return math.exp(self.loss) if self.loss < 700 else math.inf


class AbilityReport(BaseModel):
    """All of it, as far as it was measured."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    general_before: GeneralAbility | None = None
    general_after: GeneralAbility | None = None
    few_shot: Score | None = None
    """Of the base model with examples in its prompt."""
    num_examples: int = 0


async def measure_general(context: JobContext, prepared: PreparedData, moment: ScoringMoment) -> None:
    """Measure perplexity on general text, of the base model before training or of the trained one after it, once."""
    if not prepared.num_general or moment in context.store.scores(context.job_id):
        return
    is_before = moment == "general_before"
    seen = await evaluate(context, num_rows=prepared.num_general, source="general", use_adapter=not is_before)
    found = GeneralAbility(loss=seen.loss, num_tokens=int(seen.loss_weight), text_sha256=prepared.general_sha256)
    await asyncio.wrap_future(context.store.put_scores(context.job_id, moment, found.model_dump_json()))
    who = "the base model" if is_before else "the trained model"
    text = f"general text: perplexity {found.perplexity:.2f} of {who}, on {found.num_tokens} tokens"
    await context.tell(Notice(level="info", text=text))


async def score_few_shot(context: JobContext, prepared: PreparedData) -> None:
    """Score the base model with examples in its prompt, once, where the job asks for it."""
    scoring = context.spec.scoring
    if scoring is None or not scoring.few_shot or "few_shot" in context.store.scores(context.job_id):
        return
    report, seconds = await score(context, prepared, use_adapter=False, few_shot=True)
    await asyncio.wrap_future(context.store.put_scores(context.job_id, "few_shot", report.model_dump_json()))
    text = (
        f"the base model with {scoring.few_shot} examples in its prompt: {report.score.headline_text} "
        f"({report.score.num_rows} rows in {seconds:.1f} s)"
    )
    await context.tell(Notice(level="info", text=text))


def ability_of(scores: Mapping[ScoringMoment, str], num_examples: int) -> AbilityReport:
    """What the store knows of it."""

    def general(moment: ScoringMoment) -> GeneralAbility | None:
        return GeneralAbility.model_validate_json(scores[moment]) if moment in scores else None

    few_shot = ScoreReport.model_validate_json(scores["few_shot"]).score if "few_shot" in scores else None
    return AbilityReport(
        general_before=general("general_before"),
        general_after=general("general_after"),
        few_shot=few_shot,
        num_examples=num_examples if few_shot is not None else 0,
    )


def ability_lines(report: AbilityReport) -> list[tuple[str, str]]:
    """Measures with their values, for people."""
    lines = []
    if report.few_shot is not None:
        lines.append((f"base model with {report.num_examples} examples in its prompt", report.few_shot.headline_text))
    before, after = report.general_before, report.general_after
    if before is not None:
        lines.append(
            (f"perplexity on general text, base model, {before.num_tokens} tokens", f"{before.perplexity:.2f}")
        )
    if after is not None:
        cost = "" if before is None else f" ({after.perplexity / before.perplexity - 1:+.1%})"
        lines.append(("perplexity on general text, trained", f"{after.perplexity:.2f}{cost}"))
    return lines


def ability_json(report: AbilityReport) -> dict[str, object]:
    """For programs: what was measured, perplexities spelled out."""
    values: dict[str, object] = json.loads(report.model_dump_json(exclude_none=True))
    for name in ("general_before", "general_after"):
        one: GeneralAbility | None = getattr(report, name)
        if one is not None:
            values[f"{name}_perplexity"] = one.perplexity if math.isfinite(one.perplexity) else None
    return values
