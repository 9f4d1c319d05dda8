from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner, Result

from coordinator import cli
from coordinator.scheduling.problem import PlanningProblem
from partitioner.device import LinkTable
from plutino.endpoint import ENDPOINT_FILE
from plutino.errors import InfeasiblePlanError
from plutino.job.spec import JobSpec
from tests.unit.client.fake_coordinator import FakeCoordinator
from tests.unit.client.job_history import NAMES, history, plan, state
from tests.unit.partitioner.fleet import device, job, llama

HEAVY = ("torch", "transformers", "ray", "grpc", "rich", "pydantic", "numpy")


@pytest.fixture
def coordinator() -> Iterator[FakeCoordinator]:
    fake = FakeCoordinator()
    fake.address = fake.start()
    yield fake
    fake.stop()


@pytest.fixture
def state_dir(coordinator: FakeCoordinator, tmp_path: Path) -> Path:
    (tmp_path / ENDPOINT_FILE).write_text(json.dumps({"people_address": coordinator.address}))
    return tmp_path


@pytest.fixture
def job_file(tmp_path: Path) -> Path:
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump({"model": "m", "data": {"train": "t.jsonl"}}))
    return path


def plutino(*arguments: str | Path) -> Result:
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


def test_help_loads_nothing_heavy():
    program = (
        "import json, sys\nfrom coordinator import cli\ntry: cli.main(['--help'])\nexcept SystemExit: pass\n"
        "print(json.dumps(sorted(sys.modules)))"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30, check=True)

    assert set(json.loads(ended.stdout.splitlines()[-1])).isdisjoint(HEAVY)


def test_submit_detached_prints_the_id_and_how_to_watch(coordinator, state_dir, job_file):
    result = plutino("submit", job_file, "--detach", "--state-dir", state_dir)

    assert result.exit_code == 0
    assert f"plutino watch fake-1 --state-dir {state_dir}" in result.stdout
    assert len(coordinator.submitted) == 1


def test_submit_settings_overrule_the_job_file(coordinator, state_dir, job_file):
    plutino(
        "submit", job_file, "--set", "training.steps=50", "--set", "name=mine", "--detach", "--state-dir", state_dir
    )

    spec = JobSpec.model_validate_json(coordinator.submitted[0].spec_json)
    assert (spec.training.steps, spec.name) == (50, "mine")


def test_submit_misspelt_setting_names_the_nearest_and_submits_nothing(coordinator, state_dir, job_file):
    result = plutino("submit", job_file, "--set", "training.stesp=50", "--state-dir", state_dir)

    assert result.exit_code == 2
    assert "training.stesp: unknown key; did you mean 'steps'?" in result.stderr
    assert coordinator.submitted == []


def test_submit_watched_job_shows_the_course_and_the_result(coordinator, state_dir, job_file):
    coordinator.events, coordinator.state = history(), "succeeded"

    result = plutino("submit", job_file, "--state-dir", state_dir)

    assert result.exit_code == 0
    for told in (
        "step 2/2  loss 1.5000",
        "alpha",
        "exact_match        0.0%    75.0%",
        'from_pretrained("/out/adapter")',
    ):
        assert told in result.stdout


def test_watch_failed_job_gives_reason_and_exit_code_of_a_job_error(coordinator, state_dir):
    coordinator.events, coordinator.state = [state("failed", reason="beta left")], "failed"

    result = plutino("watch", "fake-1", "--state-dir", state_dir)

    assert result.exit_code == 7
    assert "plutino: fake-1 is failed: beta left" in result.stderr


def test_watch_json_prints_one_event_a_line(coordinator, state_dir):
    coordinator.events, coordinator.state = history(), "succeeded"

    lines = [
        json.loads(line) for line in plutino("watch", "fake", "--json", "--state-dir", state_dir).stdout.splitlines()
    ]

    assert [line["number"] for line in lines] == list(range(1, len(history()) + 1))
    assert lines[5]["kind"] == "StepCommitted" and lines[5]["event"]["loss"] == 3.0


def test_watch_interrupted_detaches_and_leaves_the_job_alone(coordinator, state_dir, monkeypatch):
    def interrupted(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("coordinator.screens.follow", interrupted)
    result = plutino("watch", "fake-1", "--state-dir", state_dir)

    assert result.exit_code == 0
    assert "fake-1 goes on. Attach again: plutino watch fake-1" in result.stderr
    assert coordinator.state == "running"


def test_plan_prints_the_reasons(coordinator, state_dir, job_file):
    table = llama(4)
    coordinator.plan = plan().model_dump(mode="json")
    coordinator.problem = PlanningProblem(
        job_id="fake-1",
        table=table,
        shape=job(table, batch_rows=16, micro_batch_rows=4),
        is_micro_batch_free=False,
        label_tokens_per_row=10,
        devices=tuple(device(name) for name in NAMES),
        links=LinkTable(),
        num_train_rows=32,
    ).model_dump(mode="json")

    result = plutino("plan", job_file, "--state-dir", state_dir)

    assert "[2, 4)" in result.stdout and "one device more" in result.stdout
    assert "an epoch of 2 steps" in result.stdout


def test_plan_that_does_not_fit_ends_with_the_planners_words(coordinator, state_dir, job_file):
    coordinator.error = InfeasiblePlanError("needs 5 GiB, 3 GiB offered; lower training.batch_size")

    result = plutino("plan", job_file, "--state-dir", state_dir)

    assert (result.exit_code, result.stderr) == (4, "plutino: needs 5 GiB, 3 GiB offered; lower training.batch_size\n")


@pytest.mark.parametrize(("command", "state"), [("pause", "paused"), ("resume", "running"), ("cancel", "cancelled")])
def test_change_of_state_takes_the_beginning_of_an_id(coordinator, state_dir, command, state):
    result = plutino(command, "fake", "--json", "--state-dir", state_dir)

    assert json.loads(result.stdout) == {"job_id": "fake-1", "state": state}
    assert coordinator.state == state


@pytest.mark.parametrize("arguments", [("jobs",), ("devices",), ("show", "fake-1"), ("cancel", "fake-1"), ("version",)])
def test_command_with_json_prints_one_document(state_dir, arguments):
    place = () if arguments == ("version",) else ("--state-dir", state_dir)
    result = plutino(*arguments, "--json", *place)

    assert result.exit_code == 0
    json.loads(result.stdout)


def test_command_without_a_coordinator_tells_how_to_start_one(tmp_path):
    result = plutino("jobs", "--state-dir", tmp_path)

    assert result.exit_code == 10
    assert result.stderr.startswith("plutino: no coordinator has run") and "plutino up" in result.stderr


def test_node_becomes_the_agents_process(monkeypatch):
    became: list[list[str]] = []
    monkeypatch.setattr(os, "execv", lambda path, arguments: became.append(arguments))

    plutino("node", "run", "--memory", "1GiB", "--help")

    assert became == [[sys.executable, "-m", "edge_node.cli", "run", "--memory", "1GiB", "--help"]]


def test_show_prints_plan_losses_and_history(coordinator, state_dir):
    coordinator.detail = {
        "recoveries": 1,
        "plan": plan().model_dump(mode="json"),
        "ledger": [{"status": "committed", "loss": 3.0}, {"status": "undone", "loss": 9.0}],
        "evaluations": [{"step": 2, "loss": 1.25}],
        "scores": {"after": {"score": {"metric": "exact_match", "num_rows": 4, "exact_match": 0.75, "slot_f1": None}}},
        "transitions": [
            {"at_s": 1.0, "event": "Planned", "from": "planning", "to": "loading", "plan_epoch": 1, "reason": "[why]"}
        ],
    }

    shown = plutino("show", "fake-1", "--state-dir", state_dir).stdout

    for told in ("recoveries: 1", "beta", "loss: 3.0000 -> 3.0000", "1.2500", "exact_match 75.0%", "[why]"):
        assert told in shown
