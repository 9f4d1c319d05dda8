"""The table of a sweep, drawn."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from coordinator.sweeps.choose import recommend
from coordinator.sweeps.table import sweep_table
from plutino.sweep import SweepStatus, TrialResult


def drawn(*results: TrialResult, **known: object) -> str:
    told = {"sweep_id": "sweep-1", "name": "s", "state": "succeeded", "recommendation": recommend(results)} | known
    status = SweepStatus(results=results, **told)
    console = Console(file=io.StringIO(), width=200)
    console.print(sweep_table(status))
    return console.file.getvalue()


def trial(number: int, **known: object) -> TrialResult:
    return TrialResult.model_validate(
        {"trial": number, "settings": {"method.rank": str(number)}, "state": "succeeded", "num_scored": 8} | known
    )


@pytest.mark.parametrize(
    ("name", "values"), [("perplexity", (170.5, 90.5)), ("pearson", (-0.25, 0.5))], ids=["perplexity", "correlation"]
)
def test_what_is_no_share_is_shown_as_it_is_and_the_held_out_loss_decides(name, values):
    worse, better = (
        trial(number, values={name: value}, eval_loss=loss)
        for number, value, loss in zip((1, 0), values, (5.0, 4.0), strict=True)
    )

    shown = drawn(better, worse)

    assert name in shown and str(values[0]) in shown
    assert "take trial 1" in shown and "lowest held-out loss, 4.0000" in shown


def test_shares_are_shown_in_per_cent_beside_the_base_models():
    shown = drawn(trial(0, score=0.5, values={"exact_match": 0.5}), base_score=0.125)

    assert "score" in shown and "50.0%" in shown and "base model alone: 12.5%" in shown


def test_running_sweep_tells_how_far_it_is_and_takes_nothing_yet():
    first, second = trial(0, eval_loss=4.0), trial(1, state="running", steps=3)

    assert "running, 1 of 2 trials have ended" in (shown := drawn(first, second, state="running"))
    assert "best so far: trial 1" in shown and "take" not in shown
    assert "running, round 2" in drawn(trial(0, rung=1, state="running"), trial(1, state="dropped"), state="running")
    assert "job-7 trains the recommended one once more" in drawn(first, state="running", adapter_job_id="job-7")
