"""A job that leaves its method open, handed in over real gRPC."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path

import grpc
import pytest

from tests.integration.job_cases import start
from tests.integration.stack import make_spec


def test_submit_chooses_an_open_method_on_the_devices_and_records_why(
    cleanup: ExitStack, small_model_dir: Path, rows_file: Path, tmp_path: Path
) -> None:
    people, agents = start(cleanup, tmp_path / "state", 1)
    spec = make_spec(
        small_model_dir,
        rows_file,
        tmp_path / "adapter",
        method={"type": "auto"},
        training={"steps": 2, "batch_size": 4},
    )

    job_id = people.submit(spec)

    stored = people.detail(job_id)["spec"]
    choice = stored["auto_method"]
    assert choice["why"].startswith(choice["candidates"][0]["method"])
    assert stored["method"]["type"] == "lora"  # devices of the test are as quick with every method
    assert [one["method"] for one in choice["candidates"]] == ["lora", "adapters, houlsby", "parallel_adapters"]
    assert all(one["task_s"] == pytest.approx(2 * one["step_s"]) for one in choice["candidates"])
    assert people.wait(job_id).state == "succeeded", people.job(job_id)
    told = [values["text"] for kind, values in people.events(job_id) if kind == "Notice"]
    assert f"method: auto takes {choice['why']}" in told
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["peft_type"] == "LORA"
    assert agents[0].assignments[0].spec.method.type == "lora"


def test_open_method_without_a_device_is_refused_at_once_with_the_way_out(
    cleanup: ExitStack, small_model_dir: Path, rows_file: Path, tmp_path: Path
) -> None:
    people, _ = start(cleanup, tmp_path / "state", 0)
    spec = make_spec(small_model_dir, rows_file, tmp_path / "adapter", method={"type": "auto"})

    with pytest.raises(grpc.RpcError) as refusal:
        people.submit(spec)

    assert "no device has joined; make a token for each" in refusal.value.details()
    assert refusal.value.details().count("no device has joined") == 1
