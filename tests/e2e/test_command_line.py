"""The command line end to end, as the README tells it: one coordinator and two agents for the whole module."""

from __future__ import annotations

import json
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from plutino.families import FAMILIES
from plutino.security.tokens import JoinToken
from tests.e2e.stack import PLUTINO, TEST_S, Stack, hollow_model, tiny_model, write_job

pytestmark = pytest.mark.timeout(TEST_S)


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    stack = Stack(tmp_path_factory.mktemp("stack"))
    try:
        stack.up("--engine", "local")
        for name in ("one", "two"):
            stack.node(name)
        stack.await_devices("one", "two")
        yield stack
    finally:
        stack.close()


@pytest.fixture(scope="module")
def model_dir(stack: Stack) -> Path:
    return tiny_model(stack.folder / "model")


@pytest.fixture(scope="module")
def job_file(stack: Stack, model_dir: Path) -> Path:
    return write_job(stack.folder / "job.yaml", model_dir, placement={"stages": 2})


@pytest.fixture(scope="module")
def long_job_file(stack: Stack, model_dir: Path) -> Path:
    """On one device, because a worker's imports are what a job costs here."""
    training = {"steps": 100_000, "batch_size": 4, "micro_batch_size": 2}
    return write_job(stack.folder / "long.yaml", model_dir, training=training)


def test_up_tells_the_line_that_starts_an_agent(stack):
    command, token = stack.endpoint["join"].rsplit(" ", 1)

    assert command == "plutino node join"
    assert JoinToken.decode(token).addresses == tuple(stack.endpoint["join_addresses"])


def test_devices_lists_what_every_agent_gives(stack):
    devices = {device["name"]: device for device in stack.ask("devices")}

    assert devices.keys() == {"one", "two"}
    for device in devices.values():
        assert device["memory_budget_bytes"] == 600 << 20
        assert 0 < device["baseline_bytes"] < device["memory_budget_bytes"]


def test_plan_covers_every_block_once_within_the_budgets(stack, job_file):
    plan = stack.ask("plan", job_file)

    assert [(stage["start_block"], stage["end_block"]) for stage in plan["stages"]] == [(0, 1), (1, 2)]
    assert all(stage["baseline_bytes"] + stage["job_bytes"] <= stage["budget_bytes"] for stage in plan["stages"])


def test_model_too_large_for_the_fleet_is_refused_with_what_would_fit(stack):
    """Before the first job: the agents' spare workers, which measure a block of it, are still there."""
    large = hollow_model(stack.folder / "large", hidden_size=256, intermediate_size=16384, num_hidden_layers=12)
    job = write_job(stack.folder / "too-large.yaml", large)

    planned, submitted = stack.run("plan", job), stack.run("submit", job)

    assert (planned.exit_code, submitted.exit_code) == (4, 7)
    for said in (planned.stderr, submitted.stderr):
        assert "one 600 MiB" in said and "one more device of" in said


def test_submitted_job_is_listed_watched_and_ends_with_an_adapter(stack, job_file):
    out = stack.folder / "adapter"
    job_id = stack.ask("submit", job_file, "--detach", "--set", f"output.dir={out}")["job_id"]
    assert job_id in stack.run("jobs").stdout

    watched = stack.run("watch", job_id)

    assert watched.exit_code == 0, watched.stdout + watched.stderr
    assert f'from_pretrained("{out}"' in watched.stdout
    assert (out / "adapter_model.safetensors").exists()
    # Stock peft's reload, which happens in a process of its own, found the pipeline's loss.
    assert "without the adapter" in (out / "README.md").read_text()
    assert stack.ask("show", job_id)["detail"]["ledger"][-1]["step"] == 2


def test_job_with_a_row_without_an_answer_fails_and_names_the_line(stack, model_dir):
    rows = stack.folder / "rows.jsonl"
    good = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]}
    rows.write_text("\n".join(json.dumps(row) for row in (good, {"messages": good["messages"][:1]})))
    job = write_job(stack.folder / "no-answer.yaml", model_dir, data={"train": str(rows)})

    ended = stack.run("submit", job)

    assert ended.exit_code == 7
    assert "line 2" in ended.stderr and "assistant" in ended.stderr


def test_job_whose_data_file_is_missing_fails_and_names_it(stack, model_dir):
    job = write_job(stack.folder / "no-data.yaml", model_dir, data={"train": "nowhere.jsonl"})

    ended = stack.run("submit", job)

    assert ended.exit_code in (2, 7)
    assert str(stack.folder / "nowhere.jsonl") in ended.stderr


@pytest.mark.parametrize(
    ("arguments", "exit_code", "told"),
    [
        (["--set", "training.stesp=5"], 2, "did you mean 'steps'?"),
        (["--set", "training.steps=0"], 2, "training.steps"),
        (["--set", "model.path=nowhere"], 3, "is model.path right?"),
    ],
)
def test_submit_bad_input_is_told_and_nothing_is_stored(stack, job_file, arguments, exit_code, told):
    with stack.client() as client:
        before = len(client.jobs())

        ended = stack.run("submit", job_file, *arguments)

        assert (ended.exit_code, told in ended.stderr, "Traceback" in ended.stderr) == (exit_code, True, False)
        assert len(client.jobs()) == before


def test_submit_missing_job_file_is_told(stack):
    ended = stack.run("submit", stack.folder / "none.yaml")

    assert ended.exit_code == 2
    assert "cannot read the job file" in ended.stderr


def test_submit_unknown_family_lists_the_known_ones(stack, job_file):
    other = tiny_model(stack.folder / "other", model_type="mamba")

    ended = stack.run("submit", job_file, "--set", f"model.path={other}")

    assert ended.exit_code == 3
    assert f"'mamba' is not supported; plutino knows {', '.join(sorted(FAMILIES))}" in ended.stderr


def test_up_second_coordinator_on_one_state_folder_is_refused(stack):
    command = [*PLUTINO, "up", "--engine", "local", "--listen", "127.0.0.1:0", "--api", "127.0.0.1:0"]
    options = ["--state-dir", str(stack.state_dir)]
    ended = subprocess.run([*command, *options], capture_output=True, text=True, timeout=TEST_S - 10)

    assert ended.returncode == 11
    assert str(stack.state_dir) in ended.stderr and "Traceback" not in ended.stderr


def test_job_outlives_its_watcher_and_the_coordinator_and_ends_with_the_reason_when_its_device_vanishes(
    stack, long_job_file
):
    """The last but one: it costs the module its second agent."""
    job_id = stack.ask("submit", long_job_file, "--detach", "--set", "placement.devices=[two]")["job_id"]
    command = [*PLUTINO, "watch", job_id, "--state-dir", str(stack.state_dir)]
    watching = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert watching.stdout is not None
    for line in watching.stdout:
        if "loss" in line:
            break

    watching.send_signal(signal.SIGINT)
    _, said = watching.communicate(timeout=10)
    assert (watching.returncode, f"Attach again: plutino watch {job_id}" in said) == (0, True)
    stack.await_job(job_id, lambda job: (job.state, job.step > 0) == ("running", True))

    stack.kill("coordinator")
    told = stack.run("jobs")
    assert told.exit_code == 10 and "plutino up" in told.stderr
    stack.up("--engine", "local", "--lease", "1.5")
    reached = stack.await_job(job_id, lambda job: True).step

    stack.await_job(job_id, lambda job: job.step > reached)
    assert {row["status"] for row in stack.ask("show", job_id)["detail"]["ledger"]} == {"committed"}

    stack.await_devices("two")  # which has its plain lease then, and not what a restart adds
    stack.kill("two")
    ended = stack.run("watch", job_id)

    assert ended.exit_code == 7
    assert "lost the worker of stage 0 on two" in ended.stdout
    with stack.client() as client:
        assert client.job(job_id).summary.state == "failed"


def test_cancel_ends_the_worker_and_frees_everything(stack, long_job_file):
    job_id = stack.ask("submit", long_job_file, "--detach", "--set", "placement.devices=[one]")["job_id"]
    stack.await_job(job_id, lambda job: job.step > 0)

    assert stack.ask("cancel", job_id)["state"] == "cancelled"
    with stack.client() as client:
        assert {device["reserved_bytes"] for device in client.devices()} == {0}
