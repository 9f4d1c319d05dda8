"""From settings with several values to trials."""

from __future__ import annotations

import pytest
import yaml

from coordinator.sweeps.grid import expand, label
from plutino.errors import ConfigError


@pytest.fixture
def job_file(tmp_path):
    path = tmp_path / "job.yaml"
    values = {
        "model": "m",
        "method": {"type": "lora", "rank": 16, "alpha": 32, "target_modules": ["q_proj"]},
        "data": {"train": "t.jsonl", "eval": "e.jsonl"},
    }
    path.write_text(yaml.safe_dump(values))
    return path


def test_every_combination_is_a_trial_and_a_setting_counts_for_methods_that_have_it(job_file):
    trials = expand(job_file, ["method=lora,prompt,adapters", "method.rank=4,8,16", "method.bottleneck=8,64"])
    assert [label(trial.settings) for trial in trials] == [
        "type lora, rank 4",
        "type lora, rank 8",
        "type lora, rank 16",
        "type prompt",
        "type adapters, bottleneck 8",
        "type adapters, bottleneck 64",
    ]


def test_what_the_file_says_of_a_method_is_kept_for_it_and_left_out_for_others(job_file):
    lora, prompt = expand(job_file, ["method=lora,prompt"])
    assert (lora.spec.method.alpha, lora.spec.method.target_modules) == (32, ("q_proj",))
    assert prompt.spec.method.type == "prompt"


def test_values_are_yaml_and_a_single_one_holds_for_all_trials(job_file):
    trials = expand(
        job_file, ["training.lr=1e-3,3e-3", "method.target_modules=[q_proj, v_proj],all-linear", "training.steps=7"]
    )
    assert [trial.spec.training.lr for trial in trials] == [1e-3, 1e-3, 3e-3, 3e-3]
    assert [trial.spec.method.target_modules for trial in trials[:2]] == [("q_proj", "v_proj"), "all-linear"]
    assert {trial.spec.training.steps for trial in trials} == {7}
    assert all("training.steps" not in trial.settings for trial in trials)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (["method.rnk=4,8"], "method.rnk: no method of this sweep"),
        (["method=lora,prompt", "method.bottleneck=4,8"], "method.bottleneck: no method of this sweep"),
        (["method=lora,magic"], "no method 'magic'"),
        (["training.lrr=1,2"], "training.lrr"),
        (["method.rank=4"], "several values"),
        (["method.rank"], "not a setting"),
        (["method.rank=[4"], "not YAML"),
        (["data.eval=null", "method.rank=4,8"], "data.eval"),
        (["method.rank=" + ",".join(map(str, range(1, 600)))], "more than 500"),
    ],
)
def test_what_is_no_sweep_is_refused_with_its_name(job_file, settings, told):
    with pytest.raises(ConfigError, match=told.replace(".", r"\.")):
        expand(job_file, settings)
