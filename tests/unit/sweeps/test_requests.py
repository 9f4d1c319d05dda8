"""From rows that name adapters to the jobs that answer them, on files."""

from __future__ import annotations

import json

import pytest

from coordinator.evaluate_command import _tell
from coordinator.sweeps.requests import NamedAdapter, evaluation_of, read_requests, write_rows
from plutino.errors import ConfigError, DataError
from plutino.families import family_of
from plutino.job.adapted_base import AdaptedBase
from plutino.job.adapter_method import method_of_adapter, read_adapter_config
from plutino.job.method import AdaptersConfig, LoraConfig, ParallelAdaptersConfig, PromptConfig, PTuningV2Config
from plutino.job.spec import parse_spec
from plutino.sweep import SweepStatus, TrialResult


def rows_file(tmp_path, *rows):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def adapter(tmp_path, name, **changes):
    folder = tmp_path / name
    folder.mkdir()
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], **changes}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    (folder / "adapter_model.safetensors").touch()
    return NamedAdapter(name, folder)


def test_rows_are_sorted_by_adapter_and_prompts_get_a_place_for_their_answer(tmp_path):
    path = rows_file(
        tmp_path,
        {"adapter": "b", "prompt": "1"},
        {"prompt": "2", "completion": "yes"},
        {"adapter": "a", "messages": [{"role": "user", "content": "3"}]},
        {"adapter": "b", "instruction": "4", "output": "no"},
    )

    found = read_requests(path, ["a", "b"])

    assert [(one.adapter, one.position, one.has_truth) for one in found] == [
        ("base", 1, True),
        ("a", 2, False),
        ("b", 0, False),
        ("b", 3, True),
    ]
    write_rows(found, path)
    assert [line.get("completion") for line in map(json.loads, path.read_text().splitlines())] == [
        "yes",
        None,
        "-",
        None,
    ]


def test_rows_that_name_unknown_adapters_are_told_with_their_lines_and_an_empty_file_is_refused(tmp_path):
    path = rows_file(tmp_path, *({"adapter": "c", "prompt": "1"} for _ in range(7)))
    with pytest.raises(ConfigError, match=r"'c' in line 1, 2, 3, 4, 5 \.\.\.; known are base, a: give the others"):
        read_requests(path, ["a"])
    with pytest.raises(DataError, match="no rows"):
        read_requests(rows_file(tmp_path), [])


def test_each_adapter_is_one_job_without_steps_over_its_own_range_of_one_file(tmp_path):
    named = {name: adapter(tmp_path, name, base_model_name_or_path="/models/m") for name in ("a", "b")}
    path = rows_file(tmp_path, *({"adapter": name, "prompt": "1"} for name in ("b", "a", "b")), {"prompt": "2"})
    requests = read_requests(path, named)

    spec = evaluation_of(requests, path, named, model=None, metric="json_slots", max_new_tokens=5)

    assert not spec.trains
    assert [(t.settings["adapter"], t.spec.scoring.rows) for t in spec.trials] == [
        ("base", (0, 1)),
        ("a", (1, 2)),
        ("b", (2, 4)),
    ]
    assert {t.spec.model.path for t in spec.trials} == {"/models/m"}
    assert {(t.spec.training.steps, t.spec.output.publish) for t in spec.trials} == {(0, False)}
    assert [t.spec.training.init_adapter for t in spec.trials] == [None, str(tmp_path / "a"), str(tmp_path / "b")]


def test_adapters_of_two_base_models_are_refused_unless_one_is_named(tmp_path):
    named = {name: adapter(tmp_path, name, base_model_name_or_path=f"/models/{name}") for name in ("a", "b")}
    path = rows_file(tmp_path, {"adapter": "a", "prompt": "1"}, {"adapter": "b", "prompt": "1"})
    requests = read_requests(path, named)
    options = {"metric": "exact_match", "max_new_tokens": 5}
    with pytest.raises(ConfigError, match="the adapters name 2: /models/a, /models/b; say it with --model"):
        evaluation_of(requests, path, named, model=None, **options)
    assert len(evaluation_of(requests, path, named, model="/models/a", **options).trials) == 2


@pytest.mark.parametrize(
    ("changes", "method"),
    [
        ({}, LoraConfig(rank=4, alpha=8, target_modules=("q_proj",))),
        (
            {"use_dora": True, "layers_to_transform": 1},
            LoraConfig(rank=4, alpha=8, target_modules=("q_proj",), use_dora=True, blocks=(1,)),
        ),
        ({"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 3}, PTuningV2Config(num_virtual_tokens=3, init="zero")),
        ({"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 3}, PromptConfig(num_virtual_tokens=3, init="random")),
        (
            {
                "peft_type": "PLUTINO_BOTTLENECK",
                "placement": "houlsby",
                "bottleneck": 5,
                "activation": "gelu",
                "layers": ["model.layers.1.self_attn.o_proj", "model.layers.1.mlp.down_proj"],
            },
            AdaptersConfig(placement="houlsby", bottleneck=5, activation="gelu", blocks=(1,)),
        ),
        (
            {"peft_type": "PLUTINO_SIDE_NETWORK", "reduction": 2, "blocks": [0, 3]},
            ParallelAdaptersConfig(reduction=2, blocks=(0, 3), init="random"),
        ),
    ],
)
def test_method_follows_from_the_adapters_own_config(tmp_path, changes, method):
    named = adapter(tmp_path, "a", **changes)
    assert method_of_adapter(read_adapter_config(named.folder), "a") == method


T5 = AdaptedBase(family_of("t5"), {"model_type": "t5", "num_layers": 2, "num_decoder_layers": 3, "num_heads": 4})
LLAMA = AdaptedBase(family_of("llama"), {"model_type": "llama", "num_hidden_layers": 4, "num_attention_heads": 4})
BOTTLENECK = {"peft_type": "PLUTINO_BOTTLENECK", "placement": "pfeiffer", "bottleneck": 5, "activation": "relu"}
SIDE = {"peft_type": "PLUTINO_SIDE_NETWORK", "reduction": 2, "blocks": [0, 3]}


@pytest.mark.parametrize(
    ("base", "changes", "expected"),
    [
        # peft means the block of that number in both halves, of which the encoder's is the shorter.
        (T5, {"task_type": "SEQ_2_SEQ_LM", "layers_to_transform": [1, 2]}, {"blocks": (1, 3, 4)}),
        (
            T5,
            {**BOTTLENECK, "task_type": "SEQ_2_SEQ_LM", "layers": ["encoder.block.1.x.wo", "decoder.block.0.x.wo"]},
            {"blocks": (1, 2)},
        ),
        (LLAMA, {**SIDE, "config": {"num_attention_heads": 4}}, {"heads": "narrow"}),
        (LLAMA, {**SIDE, "config": {"num_attention_heads": 2}}, {"heads": "whole"}),
    ],
)
def test_what_an_adapters_config_leaves_open_follows_from_its_base_model(tmp_path, base, changes, expected):
    named = adapter(tmp_path, "a", **changes)

    found = method_of_adapter(read_adapter_config(named.folder), "a", base)

    assert {name: getattr(found, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("base", "changes", "message"),
    [
        (None, {"task_type": "SEQ_2_SEQ_LM", "layers_to_transform": [1]}, "say it with --model"),
        (LLAMA, {"task_type": "SEQ_2_SEQ_LM"}, "is for SEQ_2_SEQ_LM, which llama does not do"),
        (T5, {"task_type": "CAUSAL_LM"}, "is for CAUSAL_LM, which t5 does not do"),
    ],
)
def test_adapters_that_do_not_go_with_their_base_model_are_refused(tmp_path, base, changes, message):
    named = adapter(tmp_path, "a", **changes)
    with pytest.raises(ConfigError, match=message):
        method_of_adapter(read_adapter_config(named.folder), "a", base)


def test_jobs_of_an_encoder_decoder_write_what_they_read_whether_its_files_are_here_or_only_its_adapters(tmp_path):
    path = rows_file(tmp_path, {"adapter": "a", "prompt": "1"}, {"prompt": "2"}, {"adapter": "b", "prompt": "1"})
    options = {"metric": "exact_match", "max_new_tokens": 5}
    named = {
        "a": adapter(tmp_path, "a", task_type="SEQ_2_SEQ_LM"),
        "b": adapter(tmp_path, "b", task_type="SEQ_2_SEQ_LM"),
    }
    requests = read_requests(path, named)
    (tmp_path / "t5").mkdir()
    (tmp_path / "t5" / "config.json").write_text(json.dumps(T5.values))

    for model in (str(tmp_path / "t5"), "somebody/not-fetched"):
        spec = evaluation_of(requests, path, named, model=model, **options)
        assert {trial.spec.objective.type for trial in spec.trials} == {"seq2seq"}
    named["b"] = adapter(tmp_path, "c", task_type="CAUSAL_LM")
    with pytest.raises(ConfigError, match="for CAUSAL_LM and SEQ_2_SEQ_LM, which no model"):
        evaluation_of(requests, path, named, model="somebody/not-fetched", **options)


def test_perplexity_is_asked_only_of_rows_that_have_true_answers(tmp_path):
    path = rows_file(tmp_path, {"prompt": "1", "completion": "yes"}, {"prompt": "2"})
    with pytest.raises(ConfigError, match="of true answers, which rows of base lack"):
        evaluation_of(read_requests(path, []), path, {}, model="m", metric="perplexity", max_new_tokens=5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "LOHA"}, "knows no adapters of type LOHA"),
        ({"bias": "all", "lora_bias": True}, "sets lora_bias, bias, which plutino's LoRA does not have"),
        ({"target_modules": ".*proj"}, "a regular expression"),
        ({"task_type": "SEQ_CLS"}, "answers with scores"),
        ({"r": 0}, "cannot be used"),
    ],
)
def test_adapters_that_plutino_cannot_compute_are_refused_with_the_reason(tmp_path, changes, message):
    named = adapter(tmp_path, "a", **changes)
    with pytest.raises(ConfigError, match=message):
        method_of_adapter(read_adapter_config(named.folder), "a")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scoring": None}, "trains nothing: set scoring"),
        ({"output": {"publish": True}}, "trains nothing: set scoring and output.publish: false"),
        ({"scoring": {"rows": [3, 3]}}, "is no range"),
    ],
)
def test_a_job_without_steps_only_scores(tmp_path, changes, message):
    values = {"model": "m", "data": {"train": "t", "eval": "e"}, "scoring": {}, "output": {"publish": False}}
    values["training"] = {"steps": 0}
    parse_spec(values, base_dir=tmp_path)
    with pytest.raises(ConfigError, match=message):
        parse_spec(values | changes, base_dir=tmp_path)


def test_people_see_each_answer_and_how_many_each_adapter_has_right(capsys):
    results = tuple(
        TrialResult(trial=n, settings={"adapter": name}, state=state, score=0.5, reason=reason, job_id=name)
        for n, (name, state, reason) in enumerate([("a", "succeeded", ""), ("b", "failed", "does not fit")])
    )
    status = SweepStatus(sweep_id="s", name="evaluate", state="failed", results=results)
    _tell(status, [{"adapter": "a", "prompt": "p", "answer": "x", "expected": "y"}], as_json=False)
    told = capsys.readouterr().out
    assert "a: succeeded, 1 rows, 50.0% right" in told and "b: failed, 0 rows: does not fit" in told
