"""What the job learns from, and how it is scored."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from plutino.job.base import SpecPart


class DataConfig(SpecPart):
    """Training and evaluation rows: jsonl of prompt-completion pairs or of OpenAI messages."""

    train: str
    """jsonl file. A relative path is taken from the job file's folder."""
    eval: str | None = None
    """jsonl file of held-out rows; needed by eval_every, keep_best, early_stopping and scoring."""
    format: Literal["auto", "prompt_completion", "messages"] = "auto"
    """auto recognises the rows by their keys."""
    max_tokens: int = Field(512, ge=2)
    """Rows longer than this are cut at the end; a row that keeps no answer token is an error."""
    limit: int | None = Field(None, ge=1)
    """Use only the first so many training rows; None means all."""
    eval_limit: int | None = Field(None, ge=1)
    """Use only the first so many held-out rows; None means all."""


class ScoringConfig(SpecPart):
    """Generate answers to the held-out prompts and compare them with the true ones."""

    metric: Literal["exact_match", "json_slots"] = "exact_match"
    """exact_match: share of answers equal but for outer white space. json_slots: valid JSON, intent, slot F1."""
    max_new_tokens: int = Field(32, ge=1)
    before: bool = True
    """Score the base model too, before the first step."""
    batch_rows: int = Field(16, ge=1)
    """Rows generated together in one group."""
    few_shot: int = Field(0, ge=0, le=64)
    """Score the base model with so many training rows as examples in its prompt, too; 0: not."""
    temperature: float = Field(0.0, ge=0)
    """0 is greedy; otherwise sampling, seeded by (job, step, sample, position)."""
