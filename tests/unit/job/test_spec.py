from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from plutino.errors import ConfigError
from plutino.job.frozen_blocks import kept_place
from plutino.job.spec import JobSpec, load_spec, parse_spec

MINIMAL: dict[str, Any] = {"model": "base", "data": {"train": "train.jsonl"}}
BASE = Path("/jobs")


def problems(**parts: Any) -> list[str]:
    """Lines of the error that a spec with these parts meets."""
    with pytest.raises(ConfigError) as caught:
        parse_spec({**MINIMAL, **parts}, base_dir=BASE)
    first, *lines = str(caught.value).splitlines()
    assert first == "the job spec has problems:"
    return [line.strip() for line in lines]


def test_parse_spec_minimal_takes_the_defaults() -> None:
    spec = parse_spec(MINIMAL, base_dir=BASE)

    assert (spec.method.type, spec.objective.type, spec.training.batch_size) == ("lora", "sft", 16)


def test_parse_spec_relative_paths_are_taken_from_the_base_folder() -> None:
    data = {"train": "train.jsonl", "eval": "../held_out.jsonl"}
    spec = parse_spec({**MINIMAL, "data": data, "output": {"dir": "/out"}}, base_dir=BASE)

    assert (spec.model.path, spec.data.train, spec.data.eval) == (
        "/jobs/base",
        "/jobs/train.jsonl",
        "/held_out.jsonl",
    )
    assert spec.output.dir == "/out"
    assert spec.training.init_adapter is None


def test_parse_spec_home_folder_is_expanded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ada")

    assert parse_spec({**MINIMAL, "model": "~/base"}, base_dir=BASE).model.path == "/home/ada/base"


def test_parse_spec_unknown_key_is_told_the_nearest() -> None:
    assert problems(training={"batchsize": 4}) == ["training.batchsize: unknown key; did you mean 'batch_size'?"]


@pytest.mark.parametrize(("part", "key", "ours"), [("training", "learning_rate", "lr"), ("method", "r", "rank")])
def test_parse_spec_name_from_another_library_is_told_ours(part: str, key: str, ours: str) -> None:
    assert problems(**{part: {key: 1}}) == [f"{part}.{key}: unknown key; did you mean {ours!r}?"]


def test_parse_spec_unknown_key_of_a_nested_part_is_compared_with_that_part() -> None:
    assert problems(training={"eval_every": 1, "early_stopping": {"patients": 2}}) == [
        "training.early_stopping.patients: unknown key; did you mean 'patience'?"
    ]


def test_parse_spec_unknown_key_like_none_lists_the_known_ones() -> None:
    assert problems(output={"zzz": 1}) == ["output.zzz: unknown key; known keys: publish, dir"]


def test_parse_spec_tells_all_problems_at_once() -> None:
    lines = problems(data={}, method={"rank": 0}, training={"lr": "fast"}, placemnt={})

    assert [line.split(":")[0] for line in lines] == ["method.rank", "data", "training.lr", "placemnt"]
    assert lines[0].endswith("(given: 0)")
    assert lines[1] == "data: give train, or tasks"


def test_parse_spec_value_of_no_allowed_type_is_one_problem() -> None:
    assert problems(training={"shadow_every": []}) == [
        "training.shadow_every: Input should be a valid integer, or Input should be 'auto' (given: [])"
    ]


def test_parse_spec_long_value_is_shown_shortened() -> None:
    (line,) = problems(name="x" * 1000)

    assert line.startswith("name: String should have at most 80 characters") and len(line) < 120


@pytest.mark.parametrize(
    ("parts", "named"),
    [
        ({"scoring": {}}, "scoring need"),
        ({"training": {"eval_every": 5}}, "training.eval_every need"),
        ({"training": {"eval_every": 5, "early_stopping": {}}}, "training.eval_every, training.early_stopping need"),
        ({"training": {"eval_every": 5, "keep_best": True}}, "training.eval_every, training.keep_best need"),
    ],
)
def test_parse_spec_evaluation_without_held_out_rows_is_refused(parts: dict[str, Any], named: str) -> None:
    assert problems(**parts) == [f"the spec: {named} held-out rows: set data.eval"]


@pytest.mark.parametrize(
    ("training", "told"),
    [
        ({"epochs": 1, "steps": 2}, "training: give epochs or steps, not both"),
        ({"early_stopping": {}}, "training: early_stopping needs eval_every: it counts evaluations"),
        ({"shadow_every": 0}, "training: shadow_every must be at least 1 step, or auto"),
    ],
)
def test_parse_spec_contradicting_settings_are_refused(training: dict[str, Any], told: str) -> None:
    assert problems(training=training) == [told]


def test_parse_spec_does_not_change_what_it_is_given() -> None:
    values = dict(MINIMAL)

    parse_spec(values, base_dir=BASE)

    assert values == MINIMAL


def test_spec_survives_json() -> None:
    spec = parse_spec({**MINIMAL, "method": {"target_modules": ["q_proj"]}}, base_dir=BASE)

    assert JobSpec.model_validate_json(spec.model_dump_json()) == spec


def test_load_spec_reads_yaml_and_takes_paths_from_its_folder(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    # YAML 1.1 reads 2e-4 as a string; it is a number all the same.
    path.write_text("model: base\ndata: {train: t.jsonl}\ntraining: {lr: 2e-4}\n")

    spec = load_spec(path)

    assert spec.data.train == str(tmp_path / "t.jsonl")
    assert spec.training.lr == 2e-4


@pytest.mark.parametrize("word", ["off", "on", "auto"])
def test_unquoted_on_and_off_are_the_words_in_files_and_overrides(tmp_path: Path, word: str) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(
        f"model: base\ndata: {{train: t.jsonl}}\ntraining: {{checkpointing: {word}, activation_cache: off}}\n"
    )

    assert load_spec(path).training.checkpointing == word
    assert load_spec(path, ["training.checkpointing=off"]).training.checkpointing == "off"
    assert load_spec(path).training.activation_cache == "off"


@pytest.mark.parametrize(("word", "expected"), [("yes", True), ("on", True), ("no", False), ("false", False)])
def test_settings_that_are_on_or_off_take_every_word_for_it(tmp_path: Path, word: str, expected: bool) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(f"model: base\ndata: {{train: t.jsonl, packing: {word}}}\n")

    assert load_spec(path).data.packing is expected


@pytest.mark.parametrize("setting", ["training.shadow_every=on", "training.batch_size=yes", "placement.replan=off"])
def test_word_where_there_is_no_such_choice_is_refused_as_it_was_written(tmp_path: Path, setting: str) -> None:
    path = tmp_path / "job.yaml"
    path.write_text("model: base\ndata: {train: t.jsonl}\n")
    key, _, word = setting.partition("=")

    with pytest.raises(ConfigError, match=rf"{key}: .*given: '{word}'"):
        load_spec(path, [setting])


def test_micro_batches_by_tokens_are_refused_beside_virtual_tokens() -> None:
    method = {"type": "prompt", "num_virtual_tokens": 4}

    (told,) = problems(method=method, training={"micro_batch_cut": "tokens"})

    assert "4 virtual tokens before each" in told and "set it to rows or auto" in told
    sampling = {"type": "grpo", "answers": 4, "rewards": [{"type": "function", "function": "reward.py:score"}]}
    (told,) = problems(objective=sampling, training={"micro_batch_cut": "tokens"})
    assert "objective.type: grpo, whose sampled answers are cut into equal numbers of rows" in told


def test_micro_batch_larger_than_a_step_is_refused_with_the_rows_of_the_step() -> None:
    (told,) = problems(training={"batch_size": 4, "micro_batch_size": 8})

    assert "training.micro_batch_size: 8 is more than a step's 4 rows" in told and "4 or less, or leave it out" in told
    sampling = {"type": "grpo", "answers": 4, "rewards": [{"type": "function", "function": "reward.py:score"}]}
    values = {**MINIMAL, "objective": sampling, "training": {"batch_size": 4, "micro_batch_size": 16}}
    assert parse_spec(values, base_dir=BASE).training.micro_batch_size == 16
    (told,) = problems(**{**values, "training": {"batch_size": 4, "micro_batch_size": 17}})
    assert "a step's 16 rows (training.batch_size: 4 x 4 answers)" in told


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"a: [", "is not valid YAML"),
        (b"- a", "must hold a mapping with the keys name, model"),
        (b"", "must hold a mapping"),
        (b"model: a\nmodel: b\n", "the key 'model' is written twice; keep one"),
        (b"training: {lr: 1, lr: 2}\n", "the key 'lr' is written twice"),
        (b"\xff\xfe", "is not UTF-8 text"),
        (b"data: !!python/object/apply:os.getcwd []\n", "is not valid YAML"),
    ],
)
def test_load_spec_unusable_file_is_refused(tmp_path: Path, content: bytes, told: str) -> None:
    path = tmp_path / "job.yaml"
    path.write_bytes(content)

    with pytest.raises(ConfigError, match=told):
        load_spec(path)


def test_load_spec_missing_file_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read the job file .*nowhere\.yaml: No such file"):
        load_spec(tmp_path / "nowhere.yaml")


def test_activation_cache_is_refused_for_methods_that_change_what_the_blocks_give(tmp_path):
    values = {
        "model": {"path": str(tmp_path)},
        "data": {"train": "rows.jsonl"},
        "training": {"activation_cache": "int8"},
    }

    assert parse_spec(values | {"method": {"type": "parallel_adapters"}}, base_dir=tmp_path)
    for blocks in ("last 4", "8-11", [3, 5]):
        for method in ("lora", "adapters"):
            assert parse_spec(values | {"method": {"type": method, "blocks": blocks}}, base_dir=tmp_path)
    changing = [
        {"type": "lora"},
        {"type": "lora", "blocks": "0-3"},
        {"type": "lora", "blocks": "last 4", "modules_to_save": ["embed_tokens"]},
    ]
    for method in changing:
        with pytest.raises(ConfigError, match=r"which method\.type: lora changes with every step; .*blocks: last 4"):
            parse_spec(values | {"method": method}, base_dir=tmp_path)
    with pytest.raises(ConfigError, match=r"type: prompt changes with every step; set it to off"):
        parse_spec(values | {"method": {"type": "prompt"}}, base_dir=tmp_path)


def test_blocks_are_said_in_one_way_for_all_methods_that_choose_them(tmp_path):
    values = {"model": {"path": str(tmp_path)}, "data": {"train": "rows.jsonl"}}
    for method in ("lora", "adapters", "parallel_adapters"):
        found = {}
        for blocks in ([9, 8], "8-9", "last 2"):
            spec = parse_spec(values | {"method": {"type": method, "blocks": blocks}}, base_dir=tmp_path)
            again = JobSpec.model_validate_json(spec.model_dump_json())
            assert again == spec
            found[str(blocks)] = again.method.lowest_trained_block(10, ())
        assert set(found.values()) == {8}
        for blocks in ("last", "last 0", "9-8", "some"):
            with pytest.raises(ConfigError, match="blocks"):
                parse_spec(values | {"method": {"type": method, "blocks": blocks}}, base_dir=tmp_path)


def test_cache_that_would_keep_nothing_is_refused_with_the_number_of_blocks(tmp_path):
    values = {
        "model": {"path": str(tmp_path)},
        "data": {"train": "rows.jsonl"},
        "training": {"activation_cache": "raw"},
        "method": {"type": "lora", "blocks": "last 4"},
    }
    spec = parse_spec(values, base_dir=tmp_path)

    assert kept_place(spec, 12) == 8
    with pytest.raises(ConfigError, match="would keep nothing: the model has 4 blocks"):
        kept_place(spec, 4)
