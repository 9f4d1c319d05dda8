"""``method: auto``: what is priced, what is taken, and what a person is told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from coordinator import cli
from coordinator.jobs.method_choice import MUST_SAVE, Option, PlannedOption, candidates, choose, is_open, refused
from partitioner.search import search
from plutino.assets import SNIPS_DIR, TINY_LLAMA_DIR
from plutino.errors import ConfigError, InfeasiblePlanError
from plutino.job.auto_method import PricedMethod
from plutino.job.spec import JobSpec, parse_spec
from tests.unit.partitioner.fleet import device, job, llama

JOB: dict[str, Any] = {
    "model": {"path": str(TINY_LLAMA_DIR), "dtype": "fp32"},
    "data": {"train": str(SNIPS_DIR / "train.jsonl"), "limit": 40},
    "training": {"epochs": 3, "batch_size": 8},
    "method": "auto",
}
PLAN = search(llama(2), job(llama(2)), [device("a")])


def spec_of(**parts: Any) -> JobSpec:
    return parse_spec({**JOB, **parts}, base_dir=SNIPS_DIR)


def option(name: str, task_s: float) -> PlannedOption:
    return PlannedOption(Option(name, spec_of()), PricedMethod(method=name, task_s=task_s), plan=PLAN)


@pytest.mark.parametrize("method", ["auto", {"type": "auto"}])
def test_open_method_stays_open_over_the_wire_and_stands_in_for_none(method: object) -> None:
    spec = spec_of(method=method)

    again = parse_spec(json.loads(spec.model_dump_json()), base_dir=SNIPS_DIR)

    assert is_open(spec) and again == spec


def test_open_method_has_no_settings() -> None:
    with pytest.raises(ConfigError, match=r"method\.rank is a setting of one method.*name the method"):
        spec_of(method={"type": "auto", "rank": 4})


def test_cache_is_an_option_of_its_own_where_rows_come_again_and_the_only_one_where_it_is_asked_for() -> None:
    once, again = (candidates(spec_of(), has_later_epochs=later) for later in (False, True))
    asked = candidates(spec_of(training={"activation_cache": "int8"}), has_later_epochs=True)

    assert [one.name for one in once] == ["lora", "adapters, houlsby", "parallel_adapters"]
    assert [one.name for one in again] == [*(one.name for one in once), "parallel_adapters, activation cache raw"]
    assert [one.name for one in asked][2:] == ["parallel_adapters, activation cache int8"]
    for one in (*once, *again, *asked):
        assert one.spec is not None and not is_open(one.spec)
        assert (one.spec.training.activation_cache != "off") == ("cache" in one.name)


def test_method_that_does_not_go_with_the_job_is_no_candidate_and_says_why() -> None:
    found = candidates(spec_of(data={**JOB["data"], "packing": True}), has_later_epochs=True)

    assert [one.spec is None for one in found] == [False, False, False, True]
    assert "data.packing" in found[-1].why_not


@pytest.mark.parametrize(("share", "taken"), [(1 - MUST_SAVE / 2, "lora"), (1 - MUST_SAVE * 2, "parallel_adapters")])
def test_lora_is_taken_unless_another_saves_enough(share: float, taken: str) -> None:
    found, choice = choose([option("lora", 100.0), option("parallel_adapters", 100.0 * share)], 50)

    assert found.priced.method == taken
    assert choice.why.startswith(f"{taken}: ") and "for 50 steps on these devices" in choice.why
    assert "against" in choice.why and "Seconds say nothing of quality" in choice.why
    assert not choice.is_open and [one.method for one in choice.candidates] == ["lora", "parallel_adapters"]


def test_job_that_no_method_fits_is_refused_with_each_reason() -> None:
    lost = [refused(Option("lora", spec_of()), "too large"), refused(Option("adapters", None), "no place")]

    with pytest.raises(InfeasiblePlanError, match="lora: too large; adapters: no place"):
        choose(lost, 50)


def test_plan_prices_every_method_as_if_it_were_named_and_takes_the_shortest(tmp_path: Path) -> None:
    fleet = tmp_path / "fleet.yaml"
    fleet.write_text(
        yaml.safe_dump({"devices": [{"name": "board", "memory": "500MiB", "flops": 1e10, "count": 2}], "rate": "1Gbit"})
    )

    def planned(**parts: Any) -> dict[str, Any]:
        path = tmp_path / "job.yaml"
        path.write_text(yaml.safe_dump({**JOB, **parts}))
        ended = CliRunner().invoke(cli.app, ["plan", str(path), "--fleet", str(fleet), "--json"])
        assert ended.exit_code == 0, ended.stderr
        return json.loads(ended.stdout)

    auto = planned()
    cached = {**JOB["training"], "activation_cache": "raw"}
    named = [
        planned(method={"type": "lora"}),
        planned(method={"type": "adapters", "placement": "houlsby"}),
        planned(method={"type": "parallel_adapters"}),
        planned(method={"type": "parallel_adapters"}, training=cached),
    ]

    priced = auto["method_choice"]["candidates"]
    assert [one["step_s"] for one in priced] == [one["step_s"] for one in named]
    shortest = min(priced, key=lambda one: one["task_s"])
    assert auto["method_choice"]["why"].startswith(shortest["method"])
    assert auto["step_s"] == shortest["step_s"]
    # Three epochs of five steps: one through the blocks, and two more.
    for one in priced:
        assert one["task_s"] == pytest.approx(5 * one["step_s"] + 10 * one["later_step_s"])
    assert [one["cache_bytes"] > 0 for one in priced] == [False, False, False, True]
    assert all(one["peak_bytes"] <= 500 << 20 for one in priced)
