"""A sweep's trials as jobs, on values."""

from __future__ import annotations

import pytest

from coordinator.sweeps.grid import expand
from coordinator.sweeps.trial_jobs import check_halving
from plutino.errors import ConfigError
from plutino.sweep import Halving, SweepSpec

JOB = """
name: compare
model: {path: model}
data: {train: train.jsonl, eval: eval.jsonl}
training: {steps: 10}
"""


def sweep(tmp_path, setting, halving):
    path = tmp_path / "job.yaml"
    path.write_text(JOB)
    return SweepSpec(name="compare", trials=expand(path, ["method.rank=4,8", setting]), halving=halving)


def test_halving_without_a_shorter_round_is_refused_with_what_would_make_one(tmp_path):
    with pytest.raises(ConfigError, match=r"steps is 10.*have 3 steps.*asks for 10; give --min-steps 3.*steps to 30"):
        check_halving(sweep(tmp_path, "training.steps=10", Halving(min_steps=10)))
    with pytest.raises(ConfigError, match=r"have 0 steps.*asks for 1; raise training.steps to 3"):
        check_halving(sweep(tmp_path, "training.steps=2", Halving(min_steps=1)))


@pytest.mark.parametrize("halving", [None, Halving(min_steps=3)], ids=["without", "with"])
def test_sweep_with_as_many_rounds_as_it_asks_for_is_taken(tmp_path, halving):
    check_halving(sweep(tmp_path, "training.steps=10", halving))
