"""What the demo measured: the value written to ``result.json`` and the table that compares it."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from coordinator.demo.bag_of_words import BagOfWordsResult
from coordinator.job_view import JobView, WorkerView
from coordinator.jobs.scoring import Score
from plutino.sizes import MIB


class ReferenceRun(BaseModel):
    """One process of transformers and peft on the same rows and steps."""

    model_config = ConfigDict(frozen=True)

    accuracy: float
    seconds: float
    """Training alone, as train_seconds."""
    peak_rss_mb: float

    @classmethod
    def from_json(cls, text: str) -> ReferenceRun:
        """Read what ``python -m coordinator.demo.reference`` wrote."""
        written = _WrittenReference.model_validate_json(text)
        return cls(accuracy=written.after.headline, seconds=written.train_s, peak_rss_mb=written.peak_rss_mib)


class _WrittenReference(BaseModel):
    """The part of coordinator.demo.reference.ReferenceResult that the demo shows; that module would import torch."""

    after: Score
    train_s: float
    peak_rss_mib: float


class AgentRun(BaseModel):
    """One agent's worker."""

    model_config = ConfigDict(frozen=True)

    name: str
    blocks: tuple[int, int]
    """Half-open: [first, one past the last)."""
    budget_mb: float
    baseline_mb: float
    peak_rss_mb: float
    predicted_job_mb: float
    measured_job_mb: float

    @classmethod
    def from_worker(cls, worker: WorkerView) -> AgentRun:
        """Bytes to MiB."""
        return cls(
            name=worker.device_name,
            blocks=(worker.start_block, worker.end_block),
            budget_mb=_mib(worker.budget_bytes),
            baseline_mb=_mib(worker.baseline_bytes),
            peak_rss_mb=_mib(worker.peak_rss_bytes),
            predicted_job_mb=_mib(worker.predicted_peak_bytes - worker.baseline_bytes),
            measured_job_mb=_mib(worker.measured_job_bytes),
        )


class DemoResult(BaseModel):
    """``result.json``. Sizes called mb are in MiB; an accuracy is the share of exact matches, or slot F1 for json."""

    model_config = ConfigDict(frozen=True)

    accuracy_before: float
    accuracy_after: float
    train_seconds: float
    """From the first step to the last."""
    total_seconds: float
    """The whole demo, the reference included."""
    tokens_per_s: float
    """In training, padding not counted."""
    losses: list[float]
    """One per step."""
    adapter_dir: str
    reference: ReferenceRun
    agents: list[AgentRun]

    @classmethod
    def from_view(cls, view: JobView, reference: ReferenceRun, *, total_s: float) -> DemoResult:
        """What came of a job that has succeeded and was scored before and after."""
        assert view.exported is not None, "a job that succeeded has an adapter"
        return cls(
            accuracy_before=headline(view, "before"),
            accuracy_after=headline(view, "after"),
            train_seconds=view.train_s,
            total_seconds=total_s,
            tokens_per_s=view.train_tokens / view.train_s,
            losses=[loss for _, loss in sorted(view.losses.items())],
            adapter_dir=view.exported.adapter_dir,
            reference=reference,
            agents=[AgentRun.from_worker(worker) for worker in view.workers.values()],
        )


def headline(view: JobView, moment: str) -> float:
    """The one number of a score: slot F1 where there is one, else the share of exact matches."""
    metrics = view.metrics(moment)
    return metrics.get("slot_f1", metrics["exact_match"])


def comparison(result: DemoResult, words: BagOfWordsResult, *, task: str, reference_threads: int) -> RenderableType:
    """The contenders beside each other, and what follows from them."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("")
    for heading in ("accuracy" if task == "intent" else "slot F1", "training s", "peak MiB per process"):
        table.add_column(heading, justify="right")
    # A bag of words cannot write JSON; it is asked for the intent alone.
    only_intent = "" if task == "intent" else " (intent alone)"
    table.add_row(f"chance: the commonest answer{only_intent}", f"{words.chance_accuracy:.1%}", "", "")
    table.add_row(f"bag of words, no language model{only_intent}", f"{words.accuracy:.1%}", f"{words.seconds:.1f}", "")
    reference = result.reference
    table.add_row(
        f"transformers + peft, one process, {reference_threads} threads",
        f"{reference.accuracy:.1%}",
        f"{reference.seconds:.1f}",
        f"{reference.peak_rss_mb:.0f}",
    )
    table.add_row("plutino, before training", f"{result.accuracy_before:.1%}", "", "")
    table.add_row(
        f"plutino, {len(result.agents)} processes",
        f"{result.accuracy_after:.1%}",
        f"{result.train_seconds:.1f}",
        " / ".join(f"{agent.peak_rss_mb:.0f}" for agent in result.agents),
        style="bold",
    )
    return Group(table, Text(_LESSON))


_LESSON = (
    "Read it rightly: on a task like this a bag of words beats a language model of 7 million parameters, and a model\n"
    "that fits one machine needs no second one. The demo shows the mechanism: no process held the whole job, and the\n"
    "result is the adapter that one process would have trained."
)


def _mib(size_bytes: int) -> float:
    return round(size_bytes / MIB, 1)
