"""The job files under examples/: all of them are jobs, and all of them run."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from coordinator import cli
from plutino.job.spec import load_spec
from tests.integration.stack import People, ThreadAgent, ThreadCoordinator, wait_until

FOLDER = Path(__file__).resolve().parents[2] / "examples"
JOBS = sorted(path for path in FOLDER.rglob("*.yaml") if "method" in yaml.safe_load(path.read_text()))


def names_of(path):
    return str(path.relative_to(FOLDER))


@pytest.mark.parametrize("path", JOBS, ids=names_of)
def test_example_is_a_job_over_files_that_are_there(path):
    spec = load_spec(path)

    files = [spec.model.path, *(file for task in spec.data.sources for file in (task.train, task.eval) if file)]
    assert all(Path(file).exists() for file in files)
    says_how = f"#   plutino submit examples/{names_of(path)}" in path.read_text().splitlines()
    assert says_how or (path.parent / "run.sh").exists()


@pytest.fixture(scope="module")
def stack(tmp_path_factory):
    with ExitStack() as stack:
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        state_dir = tmp_path_factory.mktemp("state")
        coordinator = ThreadCoordinator(state_dir)
        stack.callback(coordinator.close)
        people = People(coordinator.endpoints.people_address)
        stack.callback(people.close)
        for index in range(2):
            stack.callback(ThreadAgent(coordinator.endpoints.devices_address, f"device{index}").close)
        wait_until(lambda: len(people.devices()) == 2, "both agents attached")
        yield state_dir


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("path", JOBS, ids=names_of)
def test_example_runs_through_its_own_command_with_fewer_steps_and_rows(stack, tmp_path, path):
    tasks = yaml.safe_load(path.read_text())["data"].get("tasks")
    changes = {
        "training.steps": 2,
        "training.warmup_steps": 0,
        "training.micro_batch_size": 8,
        "scoring.max_new_tokens": 2,
        "scoring.before": "false",
        "evaluation.measure_general": "never",
        "placement.stages": 2,
        "placement.threads": 1,
        "output.dir": tmp_path / "adapter",
    } | ({} if tasks else {"data.limit": 64, "data.eval_limit": 4})
    if tasks:
        limited = [{**task, "limit": 64, "eval_limit": 4} for task in tasks]
        for task in limited:
            task |= {use: str((path.parent / task[use]).resolve()) for use in ("train", "eval")}
        changes["data.tasks"] = yaml.safe_dump(limited, default_flow_style=True, width=10**6).strip()
    settings = [part for key, value in changes.items() for part in ("--set", f"{key}={value}")]

    told = CliRunner().invoke(cli.app, ["submit", str(path), "--state-dir", str(stack), *settings])

    assert told.exit_code == 0, told.output
    assert any((tmp_path / "adapter").glob("*.safetensors"))
