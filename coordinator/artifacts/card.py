"""The card of a published adapter: what it is, how to load it, what was verified and what was not.

Entry point :func:`render_card`, a pure function of :class:`CardFacts`; the facts are also kept as JSON beside the
adapter.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import yaml
from pydantic import BaseModel, ConfigDict

from coordinator.artifacts.loading import loading_code
from coordinator.artifacts.verify_process import Check
from coordinator.jobs.scoring import value_text
from plutino.job.method import MethodConfig
from plutino.job.objective import ObjectiveConfig
from plutino.job.training import TrainingConfig


class _Facts(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class DataFile(_Facts):
    """A file of rows."""

    use: str
    """training or held-out."""
    name: str
    """Without its folder."""
    sha256: str
    num_rows: int


class Evaluation(_Facts):
    """Loss on the held-out rows."""

    step: int
    loss: float


class TrainingLosses(_Facts):
    """Mean loss per label token of the first, the last and the best step."""

    first: float
    last: float
    best: float


class ScoreFacts(_Facts):
    """What scoring the held-out rows measured."""

    num_rows: int
    values: dict[str, float]
    """By name; with the task's before it where there are several."""


class CardFacts(_Facts):
    """All that a card says."""

    job_name: str
    base_path: str
    """Folder of the base model, as the coordinator names it."""
    base_hash: str
    data: tuple[DataFile, ...]
    method: MethodConfig
    objective: ObjectiveConfig
    training: TrainingConfig
    dtype: str
    """Compute dtype of the frozen base: fp32 or bf16."""
    plan_text: str
    """Stages and devices, as people see the plan."""
    num_steps: int
    """Optimiser steps behind the published parameters."""
    losses: TrainingLosses
    evaluations: tuple[Evaluation, ...] = ()
    score_before: ScoreFacts | None = None
    """Of the base model alone; None if it was not measured."""
    score_after: ScoreFacts | None = None
    num_trained: int = 0
    """Parameters that were trained; 0: not counted."""
    trained_share: float = 0.0
    """Of the base model's parameters."""
    measures: tuple[tuple[str, str], ...] = ()
    """What fine-tuning cost beside its goal, the base model with examples, rewards: measures with their values."""
    checks: tuple[Check, ...]
    """Those of the assembled adapter, and the workers' largest difference."""
    was_reloaded: bool
    """Whether base and adapter were loaded with stock peft and run."""
    versions: dict[str, str]
    """Libraries by name."""
    training_s: float
    """From handing the job in to publication."""
    date: str
    """Day of publication, ISO 8601."""


def render_card(facts: CardFacts, adapter_name: str) -> str:
    """Text of README.md, a model card with YAML front matter as PEFT's.

    Args:
        facts: what to tell.
        adapter_name: name of the folder that the card lies in.
    """
    sections = (
        _front_matter(facts),
        f"# {_one_line(facts.job_name)}",
        f"{_what(facts)}, trained for {facts.num_steps} steps and published on {facts.date} by plutino, "
        f"{facts.training_s:.0f} s after the job was handed in: the base model was split over several devices, each of "
        "which held and trained only its own blocks.",
        "## How to load it",
        _fenced(loading_code(facts.method, facts.objective, facts.base_path, adapter_name, facts.dtype), "python"),
        "## What was verified",
        "\n".join(f"- **{_one_line(name)}**: {_one_line(outcome)}" for name, outcome in facts.checks),
        "## Results",
        _results(facts),
        "## Training data",
        _table(
            ("use", "file", "rows", "sha256"),
            [(one.use, one.name, str(one.num_rows), f"`{one.sha256}`") for one in facts.data],
        ),
        "## Base model",
        f"`{_one_line(facts.base_path)}`, hash `{facts.base_hash}` over its config.json and weights. "
        + (
            "Its weights went on from there."
            if facts.method.trains_weights
            else "On another base the adapter means nothing."
        ),
        "## Settings",
        _settings(facts),
        "## Plan",
        _fenced(facts.plan_text),
        "## Limits",
        _limits(facts),
    )
    return "\n\n".join(sections) + "\n"


def _what(facts: CardFacts) -> str:
    return "A model, every weight" if facts.method.trains_weights else f"An adapter (`{facts.method.type}`)"


def _front_matter(facts: CardFacts) -> str:
    values = {
        "base_model": facts.base_path,
        "library_name": _library(facts),
        "pipeline_tag": _pipeline_tag(facts),
        "tags": [facts.method.type, facts.objective.type, "plutino", "transformers"],
    }
    return f"---\n{yaml.safe_dump(values, sort_keys=False, allow_unicode=True)}---"


def _pipeline_tag(facts: CardFacts) -> str:
    if facts.objective.type == "seq2seq":
        return "text2text-generation"
    return "text-classification" if facts.objective.has_score_head else "text-generation"


def _library(facts: CardFacts) -> str:
    if facts.method.trains_weights:
        return "transformers"
    return "peft" if facts.method.has_peft_format else "plutino"


def _results(facts: CardFacts) -> str:
    losses = facts.losses
    trained = f"{facts.num_trained} ({facts.trained_share:.3%} of the base model's)".replace("%", " %")
    rows = [
        *([("parameters trained", trained)] if facts.num_trained else []),
        ("training loss, first step", f"{losses.first:.4f}"),
        ("training loss, last step", f"{losses.last:.4f}"),
        ("training loss, best step", f"{losses.best:.4f}"),
        *((f"held-out loss after step {one.step}", f"{one.loss:.4f}") for one in facts.evaluations),
        *_score_rows("base model alone", facts.score_before),
        *_score_rows("trained" if facts.method.trains_weights else "with the adapter", facts.score_after),
        *facts.measures,
    ]
    return _table(("measure", "value"), rows)


def _score_rows(of: str, score: ScoreFacts | None) -> list[tuple[str, str]]:
    if score is None:
        return []
    return [
        (f"{_NAMES.get(name, name.replace('_', ' '))}, {of}, {score.num_rows} held-out rows", _value_text(name, value))
        for name, value in score.values.items()
    ]


_NAMES = {
    "valid_json": "valid JSON",
    "slot_f1": "slot F1",
    "macro_f1": "macro F1",
    "auc": "AUC",
    "mse": "squared error",
}


def _value_text(name: str, value: float) -> str:
    return value_text(name, value).replace("%", " %")


def _settings(facts: CardFacts) -> str:
    settings = {
        "method": facts.method.model_dump(mode="json"),
        "objective": facts.objective.model_dump(mode="json"),
        "training": facts.training.model_dump(mode="json"),
        "compute dtype": facts.dtype,
        "versions": facts.versions,
    }
    return _fenced(yaml.safe_dump(settings, sort_keys=False, allow_unicode=True).rstrip(), "yaml")


def _limits(facts: CardFacts) -> str:
    limits = [
        "The numbers above come from the rows named above and tell nothing of other data.",
        "Nothing was measured about bias, safety or truthfulness; the base model's own limits remain.",
        "Licences of the base model and of the data bind what was made of them too; they were not examined.",
    ]
    if not facts.was_reloaded:
        limits.insert(
            0,
            "The whole model was never loaded in one place: that what was trained works follows from its "
            "names and shapes and from the stages' own comparison, not from a run.",
        )
    if facts.score_after is None:
        limits.insert(0, "No answers were generated: only the loss tells of quality.")
    return "\n".join(f"- {limit}" for limit in limits)


def _table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [header, tuple("---" for _ in header), *rows]
    return "\n".join("| " + " | ".join(_one_line(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)


def _fenced(text: str, language: str = "") -> str:
    """A code block whose fence is longer than any run of backticks in the text."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{text}\n{fence}"


def _one_line(text: str) -> str:
    return " ".join(text.split())
