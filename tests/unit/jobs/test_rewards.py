"""Rewards of sampled answers: comparisons of texts, and a user's function in a process of its own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from coordinator.jobs.rewards import Answer, rewards_of
from coordinator.jobs.rollouts import Rollouts, prompt_groups, step_of, warning_of
from plutino.data.samples import Samples
from plutino.errors import ConfigError
from plutino.job.objective import GrpoConfig
from plutino.job.rewards import AdapterReward, ExactMatchReward, FunctionReward, RegexReward, ValidJsonReward
from plutino.job.spec import load_spec, parse_spec


def answers(*texts, truth="yes"):
    return [
        Answer(prompt="Is it?", answer=text, truth=truth, line_number=10 + row, adapter_reward=row / 2)
        for row, text in enumerate(texts)
    ]


def function(tmp_path, code, *, time_limit_s=20.0):
    (tmp_path / "mine.py").write_text(code)
    return FunctionReward(function=f"{tmp_path / 'mine.py'}:reward", time_limit_s=time_limit_s)


def test_sources_compare_texts():
    sources = [ExactMatchReward(), RegexReward(pattern="^[a-z]+$"), ValidJsonReward(), AdapterReward(path="x")]

    assert rewards_of(sources, answers(" yes\n", "no", '{"a": 1}')) == [
        [1.0, 0.0, 0.0],
        [0.0, 1.0, 0.0],
        [0.0, 0.0, 1.0],
        [0.0, 0.5, 1.0],
    ]


def test_function_gets_the_texts_and_may_print_and_import_its_neighbours(tmp_path):
    (tmp_path / "neighbour.py").write_text("FACTOR = 10\n")
    code = (
        "import neighbour\n\ndef reward(prompt, answer, truth):\n"
        "    print('between the answers')\n"
        "    return neighbour.FACTOR * len(answer) + (answer == truth) + len(prompt)\n"
    )

    assert rewards_of([function(tmp_path, code)], answers("yes", "é\nno")) == [[37.0, 46.0]]


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("def reward(prompt, answer, truth):\n    raise ValueError('odd')\n", "ValueError: odd (mine.py:2)"),
        ("def reward(prompt, answer, truth):\n    return float('nan')\n", "gave nan"),
        ("def reward(prompt, answer, truth):\n    pass\n", "gave None"),
        ("def other():\n    pass\n", "has no function reward"),
        ("def reward(:\n", "SyntaxError"),
        ("import os\n\ndef reward(prompt, answer, truth):\n    os._exit(3)\n", "ended its process"),
    ],
)
def test_function_that_fails_is_told_with_the_line_of_its_prompt(tmp_path, code, said):
    with pytest.raises(ConfigError) as caught:
        rewards_of([function(tmp_path, code)], answers("no"))

    assert said in str(caught.value) and "line 10" in str(caught.value)


def test_function_that_hangs_is_ended_at_its_limit(tmp_path):
    code = "import time\n\ndef reward(prompt, answer, truth):\n    time.sleep(1000)\n"

    with pytest.raises(ConfigError, match=r"gave nothing within 0\.5 s.*time_limit_s"):
        rewards_of([function(tmp_path, code, time_limit_s=0.5)], answers("no"))


def samples(*rows):
    """Rows of (prompt, answer) tokens."""
    ids = [np.array([*prompt, *answer], np.int32) for prompt, answer in rows]
    return Samples(
        input_ids=np.concatenate(ids),
        label_mask=np.concatenate([np.ones(len(one), np.uint8) for one in ids]),
        starts=np.cumsum([0, *map(len, ids)]),
        prompt_tokens=np.array([len(prompt) for prompt, _ in rows], np.int32),
        line_numbers=np.arange(len(rows)),
        num_truncated=0,
    )


ROWS = samples(((1, 2), (9,)), ((3, 4, 5), (9,)), ((6,), (9,)))


def test_prompts_are_repeated_and_grouped_by_length_whatever_their_order():
    config = GrpoConfig(answers=2, group_rows=3)

    groups = prompt_groups(ROWS, (2, 1), config)

    assert [group.sample_indices for group in groups] == [(2, 3, 4), (5,)]
    assert [group.input_ids.tolist() for group in groups] == [[3, 4, 5, 3, 4, 5, 6], [6]]
    again = prompt_groups(ROWS, (1, 2), config)
    assert [group.sample_indices for group in again] == [group.sample_indices for group in groups]


@pytest.mark.parametrize(("loss", "weight"), [("grpo", 4), ("dapo", 7), ("dr_grpo", 40)])
def test_step_holds_prompts_with_their_answers_the_longest_first(loss, weight):
    config = GrpoConfig(answers=2, loss=loss, max_new_tokens=10)
    tokens = {2: (7, 0), 3: (8,), 4: (7, 7, 0), 5: (0,)}
    rollouts = Rollouts(
        first_step=0,
        tokens=tokens,
        rewards=dict.fromkeys(tokens, 1.0),
        advantages={2: 0.5, 3: -0.5, 4: 1.0, 5: -1.0},
        logps={sample: tuple(-float(t) for t in own) for sample, own in tokens.items()},
    )

    step = step_of(rollouts, ROWS, config, micro_batch_size=3)

    first, second = step.micro_batches
    assert step.loss_weight == weight
    assert [first.sample_indices, second.sample_indices] == [(2, 3, 4), (5,)]
    assert first.input_ids.tolist() == [3, 4, 5, 7, 0, 3, 4, 5, 8, 6, 7, 7, 0]
    assert first.label_mask.tolist() == [0, 0, 0, 1, 1, 0, 0, 0, 1, 0, 1, 1, 1]
    assert first.advantages.tolist() == [0.5, -0.5, 1.0]
    assert first.sampled_logps.tolist() == [-7, 0, -8, -7, -7, 0]
    assert Rollouts.model_validate_json(rollouts.model_dump_json()) == rollouts


def test_example_names_its_reward_function_by_the_files_own_folder_and_the_function_answers():
    folder = Path(__file__).resolve().parents[3] / "examples" / "grpo"
    spec = load_spec(folder / "job.yaml")

    assert isinstance(spec.objective, GrpoConfig)
    assert spec.objective.rewards[1].function == f"{folder / 'reward.py'}:looks_like_an_intent"
    assert rewards_of(spec.objective.rewards[1:], answers("PlayMusic", "a b", "GetWeather ")) == [[1.0, 0.0, 1.0]]


@pytest.mark.parametrize(
    ("objective", "said"),
    [
        ({"rewards": [{"type": "regex", "pattern": "("}]}, "no regular expression"),
        ({"rewards": [{"type": "function", "function": "mine:reward"}]}, "rewards.py:my_reward"),
        ({"rewards": [{"type": "adapter", "path": "a"}, {"type": "adapter", "path": "b"}]}, "one reward adapter"),
        ({"answers": 1}, "objective.answers"),
    ],
)
def test_settings_that_cannot_work_are_refused_with_the_way_out(objective, said, tmp_path):
    values = {"model": "m", "data": {"train": "t.jsonl"}, "objective": {"type": "grpo", **objective}}

    with pytest.raises(ConfigError) as caught:
        parse_spec(values, base_dir=tmp_path)

    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("part", "said"),
    [({"data": {"train": "t.jsonl", "packing": True}}, "data.packing"),
     ({"training": {"activation_cache": "raw"}}, "activation_cache")],
)  # fmt: skip
def test_settings_that_do_not_go_with_sampled_answers_are_refused(part, said, tmp_path):
    values = {"model": "m", "data": {"train": "t.jsonl"}, "objective": {"type": "grpo"}, **part}

    with pytest.raises(ConfigError, match=said):
        parse_spec(values, base_dir=tmp_path)


def test_first_answers_of_one_reward_are_warned_of_and_none_that_differ_or_come_later():
    tokens = {0: (1,), 1: (2,)}
    flat = Rollouts(first_step=0, tokens=tokens, rewards={0: 0.0, 1: 0.0})

    assert "all 2 answers of the first step have the reward 0;" in warning_of(flat)
    assert warning_of(flat.model_copy(update={"first_step": 4})) == ""
    assert warning_of(flat.model_copy(update={"rewards": {0: 0.0, 1: 0.5}})) == ""
