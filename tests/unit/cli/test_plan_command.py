from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest
import yaml
from typer.testing import CliRunner

from coordinator import cli
from coordinator.plan_command import consider, plan_text
from coordinator.scheduling.problem import PlanningProblem
from partitioner.device import LinkTable
from partitioner.fleet_file import FleetFile, changed, parse_rate
from plutino.errors import ConfigError
from plutino.sizes import GIB, MIB
from tests.unit.partitioner.fleet import device, job, llama

JOB = Path(__file__).parents[3] / "examples" / "snips" / "intent.yaml"
FLEET = {
    "devices": [
        {"name": "laptop", "memory": "1GiB", "flops": 2e10},
        {"name": "board", "memory": "600MiB", "flops": 1e10, "count": 2},
    ],
    "rate": "100Mbit",
    "links": [{"between": ["laptop", "board-1"], "rate": "1Gbit", "latency_ms": 0.2}],
}


@pytest.fixture
def fleet_file(tmp_path):
    path = tmp_path / "fleet.yaml"
    path.write_text(yaml.safe_dump(FLEET))
    return path


def problem(**changes):
    table = llama(8)
    values = {
        "job_id": "p",
        "table": table,
        "shape": job(table),
        "is_micro_batch_free": True,
        "label_tokens_per_row": 20,
        "devices": (device("a"), device("b", speed=2)),
        "links": LinkTable(),
        "num_train_rows": 100,
    }
    return PlanningProblem(**(values | changes))


def plutino(*arguments):
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


def test_plan_over_a_fleet_file_needs_no_coordinator(fleet_file, tmp_path):
    picture = tmp_path / "plan.svg"

    result = plutino(
        "plan", JOB, "--fleet", fleet_file, "--json", "--what-if", "add 2GiB 4x", "--what-if", "remove board-2",
        "--gantt", picture, "--state-dir", tmp_path / "none",
    )  # fmt: skip

    found = json.loads(result.stdout)
    low_s, high_s = found["figures"]["step_range_s"]
    assert low_s <= found["step_s"] <= high_s
    assert found["figures"]["epoch_s"] == pytest.approx(found["figures"]["steps_per_epoch"] * found["step_s"])
    assert all(0 < use["peak_bytes"] <= use["budget_bytes"] for use in found["figures"]["devices"])
    add, remove = found["what_if"]
    assert add["step_s"] < found["step_s"] <= remove["step_s"] * (1 + 1e-9)
    assert ElementTree.parse(picture).getroot().tag.endswith("svg")


def test_plan_text_tells_range_margin_links_and_changes():
    one = problem()
    planned = consider(one, one.plan(), ["remove b", "rate 1Mbit"])
    text = plan_text(planned)

    assert "s with jitter), an epoch of 13 steps" in text
    assert all(f"{use.margin_bytes / MIB:.0f} MiB of {use.budget_bytes / MIB:.0f} MiB" in text for use in
               planned.figures.devices)  # fmt: skip
    for link in planned.plan.links:
        assert f"{link.from_device} to {link.to_device}: {link.down_bytes / MIB:.2f} MiB down" in text
    assert "remove b: " in text and "rate 1Mbit: " in text and "backward: #" in text


@pytest.mark.parametrize("as_json", [False, True])
def test_plan_that_is_refused_still_answers_what_a_change_would_give(fleet_file, tmp_path, as_json):
    small = {"devices": [{"name": "board", "memory": "360MiB", "flops": 1e10, "host": "h"}]}
    fleet_file.write_text(yaml.safe_dump(small))

    result = plutino(
        "plan", JOB, "--fleet", fleet_file, "--what-if", "add 8GiB 2x", "--what-if", "add 352MiB",
        *(["--json"] if as_json else []), "--state-dir", tmp_path / "none",
    )  # fmt: skip

    assert result.exit_code == 4
    assert "does not fit" in result.stderr
    if as_json:
        found = json.loads(result.stdout)
        assert "does not fit" in found["refusal"]
        assert [what_if["step_s"] is None for what_if in found["what_if"]] == [False, True]
    else:
        fits, lacks = result.stdout.splitlines()[1:3]
        assert "add 8GiB 2x: " in fits and "it fits, on added 1" in fits
        assert "add 352MiB: the job does not fit" in lacks


def test_plan_what_if_that_does_not_fit_says_why():
    alone = problem(devices=(device("a"),))

    (what_if,) = consider(alone, alone.plan(), ["memory a 301MiB"]).what_ifs

    assert what_if.plan is None and "does not fit" in what_if.reason


@pytest.mark.parametrize("change", ["", "add", "add lots", "remove nobody", "memory a", "rate fast", "add 8GiB fast"])
def test_change_that_is_not_understood_says_what_is(change):
    with pytest.raises(ConfigError, match=r"write|no device is called"):
        changed([device("a")], LinkTable(), change)


def test_change_adds_a_device_as_fast_as_told():
    devices, _ = changed([device("a"), device("b"), device("c", speed=9)], LinkTable(), "add 8GiB 2x")

    assert devices[-1].available_bytes == 8 * GIB
    assert devices[-1].timings.forward_s == pytest.approx(device("b").timings.forward_s / 2)


@pytest.mark.parametrize(("text", "rate"), [("100Mbit", 12.5e6), ("2.5 Gbit/s", 312.5e6), ("800bit", 100.0)])
def test_rate_is_bytes_a_second(text, rate):
    assert parse_rate(text) == rate


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"devices": []}, "at least 1"),
        ({"devices": [{"name": "a", "memory": "1GiB"}]}, "give flops or block_forward_s"),
        ({"devices": [{"name": "a", "memory": "much", "flops": 1e9}]}, "is not a size"),
        ({"devices": [{"name": "a", "memory": "1GiB", "flops": 1e9}] * 2}, "two devices are called a"),
        (FLEET | {"links": [{"between": ["laptop", "x"], "rate": "1Gbit"}]}, "no device is called x"),
        (FLEET | {"speed": 3}, "not permitted"),
    ],
)
def test_fleet_file_mistake_is_told_with_its_place(tmp_path, values, message):
    path = tmp_path / "fleet.yaml"
    path.write_text(yaml.safe_dump(values))

    result = plutino("plan", JOB, "--fleet", path)

    assert result.exit_code != 0
    assert message in result.stderr and str(path) in result.stderr


def test_fleet_file_seconds_follow_from_operations():
    table = llama(4)
    quick, slow = FleetFile.model_validate(
        {"devices": [{"name": n, "memory": "1GiB", "flops": f} for n, f in (("q", 2e10), ("s", 1e10))]}
    ).profiles(table, job(table))

    assert slow.timings.forward_s == pytest.approx(2 * quick.timings.forward_s)
    tokens = 2 * 64
    assert quick.timings.forward_s == pytest.approx(
        (2 * tokens * sum(table.block_params) / 4 + 4 * tokens * 64 * 64) / 2e10
    )
