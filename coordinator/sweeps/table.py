"""A sweep as people see it."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from coordinator.jobs.scoring import value_text
from coordinator.sweeps.choose import ranked
from coordinator.sweeps.grid import label
from plutino.sizes import MIB
from plutino.sweep import SweepStatus, TrialResult

_JOB_ENDED = ("succeeded", "failed", "cancelled")


def sweep_table(status: SweepStatus) -> RenderableType:
    """Trials, the best first, with the recommendation and its reason."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    is_share = not any(result.values and result.score is None for result in status.results)
    measured = next((name for result in status.results for name in result.values), "score").replace("_", " ")
    for heading in (
        "trial",
        "settings",
        ">score" if is_share else f">{measured}",
        ">held-out loss",
        ">trained",
        ">share",
        ">peak MiB",
        ">train s",
        ">s",
    ):
        is_number = heading.startswith(">")
        table.add_column(heading.removeprefix(">"), justify="right" if is_number else "left", no_wrap=is_number)
    table.add_column("state")
    rung = max((result.rung for result in status.results), default=0)
    best = ranked([result for result in status.results if result.rung == rung])
    others = [result for result in status.results if result not in best]
    for result in (*best, *sorted(others, key=lambda r: (-r.rung, r.trial))):
        is_chosen = status.recommendation is not None and status.recommendation.trial == result.trial
        table.add_row(*_cells(result), style="bold" if is_chosen else "")
    parts: list[RenderableType] = [Text(_heading(status)), table]
    if status.base_score is not None:
        parts.append(Text(f"base model alone: {status.base_score:.1%}"))
    if status.recommendation is not None:
        chosen = status.results[status.recommendation.trial]
        take = "take" if status.state == "succeeded" else "best so far:"
        settings = label(chosen.settings) or "as the file says"
        parts.append(Text(f"{take} trial {chosen.trial + 1} ({settings}): {status.recommendation.reason}"))
    if status.adapter_dir is not None:
        parts.append(Text(f"its adapter, verified: {status.adapter_dir}", style="bold"))
    return Group(*parts)


def _heading(status: SweepStatus) -> str:
    """Its state, and what it does where the table does not tell."""
    told = f"{status.sweep_id}  {status.state}"
    if not status.has_ended:
        if status.adapter_job_id is None:
            rung = max(result.rung for result in status.results)
            num_ended = sum(result.state in _JOB_ENDED for result in status.results if result.rung == rung)
            told += f", round {rung + 1}" if rung else f", {num_ended} of {len(status.results)} trials have ended"
        else:
            told += f"; {status.adapter_job_id} trains the recommended one once more, and publishes its adapter"
    return f"{told}  {status.reason}".rstrip()


def progress(status: SweepStatus) -> list[str]:
    """Lines for a log, one for each trial's job that has ended."""
    lines = []
    for result in status.results:
        if result.state in _JOB_ENDED:
            score = "" if result.score is None else f", score {result.score:.1%}"
            loss = "" if result.eval_loss is None else f", held-out loss {result.eval_loss:.4f}"
            why = f": {result.reason}" if result.reason else ""
            lines.append(
                f"trial {result.trial + 1} ({label(result.settings)}) after {result.steps} steps: "
                f"{result.state}{why}{score}{loss}"
            )
    return lines


def _score(result: TrialResult) -> str:
    """What compares trials, or the first of what was measured where the held-out loss does."""
    if result.score is not None:
        return f"{result.score:.1%}"
    return next((value_text(name, value) for name, value in result.values.items()), "")


def _cells(result: TrialResult) -> tuple[str, ...]:
    return (
        str(result.trial + 1),
        label(result.settings) or "-",
        _score(result),
        "" if result.eval_loss is None else f"{result.eval_loss:.4f}",
        str(result.trained_params) if result.trained_params else "",
        f"{result.trained_share:.3%}" if result.trained_params else "",
        f"{result.peak_bytes / MIB:.0f}" if result.peak_bytes else "",
        f"{result.train_s:.1f}" if result.train_s else "",
        f"{result.total_s:.1f}" if result.total_s else "",
        f"{result.state} at step {result.steps}" if result.steps else result.state,
    )
