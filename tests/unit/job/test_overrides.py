from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from plutino.errors import ConfigError
from plutino.job.overrides import apply_overrides
from plutino.job.spec import load_spec


def applied(values: dict, *overrides: str) -> dict:
    return apply_overrides(values, overrides, path_keys=("data.train",), base_dir=Path("/here"))


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("training.steps=50", {"training": {"steps": 50}}),
        ("training.lr=1e-3", {"training": {"lr": "1e-3"}}),
        ("placement.devices=[a, b]", {"placement": {"devices": ["a", "b"]}}),
        ("scoring=null", {"scoring": None}),
        ("name=a=b", {"name": "a=b"}),
        ("data.train=rows.jsonl", {"data": {"train": "/here/rows.jsonl"}}),
    ],
)
def test_override_places_a_yaml_value(override, expected):
    assert applied({}, override) == expected


def test_overrides_leave_the_given_values_alone_and_the_last_wins():
    values = {"training": {"steps": 1, "lr": 0.1}}

    assert applied(values, "training.steps=2", "training.steps=3") == {"training": {"steps": 3, "lr": 0.1}}
    assert values == {"training": {"steps": 1, "lr": 0.1}}


@pytest.mark.parametrize("override", ["training.steps", "=5", "training..steps=5"])
def test_override_that_is_no_setting_is_told_with_an_example(override):
    with pytest.raises(ConfigError, match=r"training\.steps=50"):
        applied({}, override)


def test_override_through_a_plain_value_is_told():
    with pytest.raises(ConfigError, match="name is 'x' there, not a group of keys"):
        applied({"name": "x"}, "name.first=y")


def test_override_value_that_is_not_yaml_is_told():
    with pytest.raises(ConfigError, match="not YAML"):
        applied({}, "placement.devices=[a")


def test_load_spec_relative_override_is_taken_from_the_current_folder(tmp_path, monkeypatch):
    job = tmp_path / "jobs" / "job.yaml"
    job.parent.mkdir()
    job.write_text(yaml.safe_dump({"model": "m", "data": {"train": "t.jsonl"}}))
    monkeypatch.chdir(tmp_path)

    spec = load_spec(job, ["output.dir=out", "model=other"])

    assert (spec.output.dir, spec.model.path) == (str(tmp_path / "out"), str(tmp_path / "other"))
    assert spec.data.train == str(tmp_path / "jobs" / "t.jsonl")
