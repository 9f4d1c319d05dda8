"""Every example is a job that can be planned, over data that may be shipped, and its run script is sound."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from coordinator.jobs.offline_planning import load_fleet, offline_problem
from coordinator.llm2llm.rows import read_seeds
from coordinator.llm2llm.teachers.recorded import RecordedAnswers
from partitioner.plan import Plan
from plutino.job.spec import load_spec
from plutino.llm2llm import load_loop

EXAMPLES = Path(__file__).resolve().parent.parent.parent / "examples"
KINDS = sorted(path.parent.name for path in EXAMPLES.glob("*/job.yaml"))


def test_there_is_an_example_of_every_kind():
    assert {"dapt", "multitask", "classification", "regression", "reward", "dpo", "grpo", "llm2llm"} <= set(KINDS)


@pytest.mark.parametrize("kind", KINDS)
def test_example_is_read_and_planned_and_small(kind):
    folder = EXAMPLES / kind
    problem = offline_problem(load_spec(folder / "job.yaml"), load_fleet(EXAMPLES / "fleets" / "home.yaml"))
    assert isinstance(problem.plan_or_refusal(), Plan)
    assert sum(path.stat().st_size for path in folder.rglob("*")) < 1_000_000
    assert os.access(folder / "run.sh", os.X_OK)
    subprocess.run(["sh", "-n", folder / "run.sh", EXAMPLES / "on_this_machine.sh"], check=True, timeout=10)
    assert (folder / "README.md").read_text().startswith("# ")


def test_recorded_answers_are_about_the_seed_rows_of_their_loop():
    loop = load_loop(EXAMPLES / "llm2llm" / "loop.yaml")
    RecordedAnswers(loop.loop.teacher)
    _, seeds = read_seeds(loop.job.data.sources[0])
    lines = (EXAMPLES / "llm2llm" / "answers.jsonl").read_text().splitlines()
    about = {json.dumps(json.loads(line)["row"], ensure_ascii=False, sort_keys=True) for line in lines}
    assert about == {seed.json for seed in seeds}
