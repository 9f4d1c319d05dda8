from __future__ import annotations

import inspect
from pathlib import Path

import pytest

from coordinator.cli import app
from coordinator.demo.demo import DemoOptions
from coordinator.demo.job import DEVICES, QUANTIZATION, job_values, reference_values, whole_job_values
from plutino.job.spec import load_spec, parse_spec
from plutino.sizes import MIB

EXAMPLES_DIR = Path(__file__).resolve().parents[3] / "examples" / "snips"


def values(task: str = "intent") -> dict:
    return job_values(task, adapter_dir=Path("/out/adapter"), seed=0, is_fast=False)


def test_demo_every_budget_is_below_what_the_whole_job_needs():
    budgets = [device.budget_bytes(300 * MIB, 100 * MIB) for device in DEVICES]

    assert all(300 * MIB < budget < 400 * MIB for budget in budgets)
    assert len(set(budgets)) == len(DEVICES)


@pytest.mark.parametrize("task", ["intent", "json"])
def test_demo_job_is_the_example_with_a_fixed_placement(task):
    demo = parse_spec(values(task), base_dir=Path("/"))
    example = load_spec(EXAMPLES_DIR / f"{task}.yaml")

    assert (demo.model, demo.method, demo.data, demo.scoring) == (
        example.model, example.method, example.data, example.scoring
    )  # fmt: skip
    fixed = {"micro_batch_size": demo.training.micro_batch_size, "checkpointing": "off"}
    assert demo.training == example.training.model_copy(update=fixed)


def test_whole_job_differs_in_nothing_but_its_place():
    whole = parse_spec(whole_job_values(values(), "large"), base_dir=Path("/"))

    assert (whole.placement.devices, whole.placement.stages) == (("large",), 1)
    assert whole.model_copy(update={"placement": None}) == parse_spec(values(), base_dir=Path("/")).model_copy(
        update={"placement": None}
    )


def test_reference_takes_the_same_steps_with_the_whole_batch_at_once():
    reference = parse_spec(reference_values(values(), threads=2), base_dir=Path("/"))

    assert reference.placement.threads == 2
    assert reference.training.micro_batch_size is None
    assert reference.training.steps == values()["training"]["steps"]


def test_demo_holds_weights_in_nf4_unless_asked_otherwise(tmp_path):
    demo = next(command for command in app.registered_commands if command.callback.__name__ == "demo")
    option = inspect.signature(demo.callback).parameters["quantization"]

    assert DemoOptions(out_dir=tmp_path).quantization == QUANTIZATION == option.default == "nf4"


def test_demo_job_quantises_the_devices_but_not_the_reference(tmp_path):
    values = job_values("intent", adapter_dir=tmp_path, seed=0, is_fast=True, quantization="nf4")

    assert parse_spec(values, base_dir=tmp_path).model.quantization == "nf4"
    assert parse_spec(reference_values(values, threads=1), base_dir=tmp_path).model.quantization == "none"
