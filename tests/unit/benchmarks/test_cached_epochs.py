"""What the benchmark of cached epochs makes of its runs: ratios as the goals name them, and seconds of moves."""

from __future__ import annotations

import pytest

from benchmarks.cached_epochs import _moves_s, ratios
from plutino.events import JobStateChanged, PlanChanges


def run(codec, agents=2, **figures):
    return {"shape": "s", "codec": codec, "agents": agents} | figures


CACHED = {"first_epoch_step_s": 2.1, "cached_step_s": [0.3, 0.5], "cached_over_first": 0.19, "total_s": 50.0}


def state(name):
    return JobStateChanged(state=name, reason="", next_step=0, total_steps=9)


def test_ratios_hold_a_cached_job_against_its_fellows():
    found = [
        run("int4", **CACHED, moves_s=[1.0, 2.0], peak_job_mib=[250, 80, 60]),
        run("int4", 1, **{**CACHED, "cached_step_s": [0.6, 0.8]}, moves_s=[], peak_job_mib=[1]),
        run("off", first_epoch_step_s=2.0),
        run("full", peak_job_mib=[1000]),
    ]

    of_two, alone = ratios(found)

    assert of_two["writing"] == pytest.approx(0.05)
    assert of_two["moves_over_all"] == pytest.approx(0.06)
    assert of_two["job_bytes_over_full"] == pytest.approx([0.25, 0.08, 0.06])
    assert of_two["cached_speedup_over_one_agent"] == pytest.approx(1.75)
    assert (alone["writing"], alone["job_bytes_over_full"]) == (None, None)


def test_a_move_lasts_from_its_decision_until_the_job_runs_again():
    seen = [
        (1.0, state("running")),
        (5.0, PlanChanges(step=2, plan_epoch=2, reason="")),
        (6.0, state("loading")),
        (8.0, state("running")),
        (9.0, PlanChanges(step=6, plan_epoch=3, reason="")),
        (9.5, state("running")),
    ]

    assert _moves_s(seen) == [3.0, 0.5]
