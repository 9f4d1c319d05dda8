"""What the tests of whole objective jobs share: rows, a coordinator with two devices, and a job run to its end."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from plutino.assets import SNIPS_DIR, TINY_LLAMA_DIR
from plutino.job.spec import parse_spec
from tests.integration.stack import People, ThreadAgent, ThreadCoordinator, wait_until

INTENTS = ("AddToPlaylist", "GetWeather", "PlayMusic")


def snips(num_rows: int) -> list[dict[str, str]]:
    lines = (SNIPS_DIR / "train.jsonl").read_text().splitlines()[:num_rows]
    turns = [[message["content"] for message in json.loads(line)["messages"]] for line in lines]
    return [{"prompt": prompt, "completion": completion} for prompt, completion in turns]


def write(path: Path, rows: list[dict[str, object]]) -> Path:
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


def labelled(path: Path, num_rows: int) -> Path:
    rows = [{"text": row["prompt"], "label": INTENTS[i % 3]} for i, row in enumerate(snips(num_rows))]
    return write(path, rows)


def preferences(path: Path, num_rows: int) -> Path:
    rows = [{"prompt": r["prompt"], "chosen": r["completion"], "rejected": " I do not know"} for r in snips(num_rows)]
    return write(path, rows)


class Fleet(People):
    """People with two devices that are threads of this process."""

    agents: list[ThreadAgent]


def two_devices(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """For a module's fixture."""
    with ExitStack() as stack:
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        coordinator = ThreadCoordinator(tmp_path_factory.mktemp("state"))
        stack.callback(coordinator.close)
        people = Fleet(coordinator.endpoints.people_address)
        stack.callback(people.close)
        people.agents = [ThreadAgent(coordinator.endpoints.devices_address, f"device{index}") for index in range(2)]
        for agent in people.agents:
            stack.callback(agent.close)
        wait_until(lambda: len(people.devices()) == 2, "both agents attached")
        yield people


def submit(people, folder, *, stages, **parts):
    values = {
        "model": {"path": str(TINY_LLAMA_DIR), "dtype": "fp32"},
        "training": {"steps": 3, "batch_size": 4, "micro_batch_size": 2, "lr": 2e-3},
        "output": {"dir": str(folder / f"adapter{stages}")},
        **parts,
        # Thread agents make their profiles up: that their workers' pace differs from them means nothing.
        "placement": {"stages": stages, "replan": "never"},
    }
    return people.submit(parse_spec(values, base_dir=folder))


def run(people, folder, *, stages, **parts):
    job_id = submit(people, folder, stages=stages, **parts)
    assert people.wait(job_id).state == "succeeded", people.job(job_id)
    return people.detail(job_id)
