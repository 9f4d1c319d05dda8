"""GRPO as whole jobs over real gRPC: answers sampled on the workers, rewarded, learnt from, kept for a loss."""

from __future__ import annotations

import threading

import pytest

from edge_node.engine.generate import _Generation
from tests.integration.job_cases import adapter_bytes, cancel_request, save_small_model
from tests.integration.objective_jobs import run, snips, submit, two_devices, write
from tests.integration.stack import WAIT_S, losses, wait_until
from tests.integration.step_gate import StepGate

GRPO = {"type": "grpo", "answers": 3, "max_new_tokens": 4, "group_rows": 4, "updates": 2, "top_p": 0.95, "beta": 0.1}
TRAINING = {"steps": 4, "batch_size": 2, "micro_batch_size": 2, "lr": 1e-2, "shadow_every": 1}


@pytest.fixture(scope="module")
def people(tmp_path_factory):
    yield from two_devices(tmp_path_factory)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return save_small_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def parts(tmp_path, model_dir):
    """A small job whose reward is a user's function."""
    (tmp_path / "mine.py").write_text(
        "def vowels(prompt, answer, truth):\n    return sum(c in 'aeiou' for c in answer)\n"
    )
    reward = {"type": "function", "function": "mine.py:vowels"}
    return {
        "model": {"path": str(model_dir), "dtype": "fp32"},
        "method": {"type": "lora", "rank": 4},
        "objective": {**GRPO, "rewards": [reward, {"type": "exact_match", "weight": 2.0}]},
        "data": {"train": str(write(tmp_path / "train.jsonl", snips(7)))},
        "training": TRAINING,
    }


def step_events(people, job_id):
    return [event for kind, event in people.events(job_id) if kind == "StepCommitted"]


def test_job_gives_the_same_bits_on_one_and_two_workers_and_reports_what_it_sampled(people, tmp_path, parts):
    job_ids = []
    for stages in (1, 2):  # at once, their checks in this process would get in each other's way
        job_ids.append(submit(people, tmp_path, stages=stages, **parts))
        assert people.wait(job_ids[-1]).state == "succeeded", people.job(job_ids[-1])

    details = [people.detail(job_id) for job_id in job_ids]
    assert losses(details[0]) == losses(details[1])
    assert adapter_bytes(tmp_path / "adapter1") == adapter_bytes(tmp_path / "adapter2")
    seen = [[event["counts"] for event in step_events(people, job_id)] for job_id in job_ids]
    assert seen[0] == seen[1]
    first, second, third, _ = seen[0]
    # Two steps learn from the same answers, and the first of them from the policy that gave them.
    assert first["reward"] == second["reward"] != third["reward"]
    assert first["reward 0 function"] == first["reward"] and first["reward 1 exact_match"] == 0.0
    assert (first["kl"], first["clipped_share"]) == (0.0, 0.0)
    assert second["kl"] > 0
    # Each step's rows are two of the seven, and both steps on the same answers name the same.
    rows = [row["samples"] for row in sorted(details[1]["ledger"], key=lambda row: row["step"])]
    assert all(len(set(one)) == 2 and max(one) < 7 for one in rows)
    assert rows[0] == rows[1] and rows[2] == rows[3]
    card = (tmp_path / "adapter2" / "README.md").read_text()
    last = seen[0][-1]["reward"]
    assert f"| mean reward, first and last 1 of 4 steps | {first['reward']:.4g}, {last:.4g} |" in card


@pytest.mark.slow
def test_job_that_lost_a_worker_between_two_steps_on_the_same_answers_ends_with_the_same_bits(
    people, tmp_path, parts, monkeypatch
):
    undisturbed = run(people, tmp_path, stages=2, **parts)
    expected = adapter_bytes(tmp_path / "adapter2")
    gate = StepGate(monkeypatch)
    gate.hold_at(3)
    job_id = submit(people, tmp_path, stages=2, **{**parts, "output": {"dir": str(tmp_path / "again")}})
    people.wait_for_step(job_id, 3)
    agent, ref = next((agent, ref) for agent in people.agents for ref in agent.sessions if ref.job_id == job_id)
    agent.lose_worker(ref)
    gate.open()

    assert people.wait(job_id).state == "succeeded", people.job(job_id)
    detail = people.detail(job_id)
    assert max(row["plan_epoch"] for row in detail["ledger"]) == 2
    assert losses(detail) == losses(undisturbed)
    assert adapter_bytes(tmp_path / "again") == expected


@pytest.mark.slow
def test_reward_adapter_of_a_finished_job_scores_the_answers_on_the_same_stages(people, tmp_path, parts):
    rated = [{"prompt": r["prompt"], "completion": r["completion"], "rating": i % 2} for i, r in enumerate(snips(8))]
    data = {"train": str(write(tmp_path / "rated.jsonl", rated)), "format": "rated"}
    reward_dir = tmp_path / "reward"
    objective = {"type": "reward", "labels": "ratings"}
    run(
        people,
        tmp_path,
        stages=1,
        **{**parts, "objective": objective, "data": data, "output": {"dir": str(reward_dir)}},
    )

    sources = [{"type": "adapter", "path": str(reward_dir)}]
    job_id = submit(people, tmp_path, stages=2, **{**parts, "objective": {**GRPO, "rewards": sources}})

    assert people.wait(job_id).state == "succeeded", people.job(job_id)
    first, second, *_ = (event["counts"] for event in step_events(people, job_id))
    assert first["reward_std"] > 0 and first["reward"] == second["reward"]


def test_reward_function_that_fails_ends_the_job_and_names_the_row(people, tmp_path, parts):
    (tmp_path / "mine.py").write_text("def vowels(prompt, answer, truth):\n    return 1 / 0\n")

    job_id = submit(people, tmp_path, stages=1, **parts)

    summary = people.wait(job_id)
    assert summary.state == "failed"
    assert "mine.py:vowels on an answer to line" in summary.reason and "ZeroDivisionError" in summary.reason


@pytest.mark.slow
def test_cancelled_while_it_samples_a_job_ends_and_its_workers_with_it(people, tmp_path, parts, monkeypatch):
    started, go_on = [], threading.Event()
    sample = _Generation._sample

    def held(self, g, position, logits):
        started.append(position)
        assert go_on.wait(WAIT_S)
        return sample(self, g, position, logits)

    monkeypatch.setattr(_Generation, "_sample", held)
    job_id = submit(people, tmp_path, stages=2, **parts)
    wait_until(lambda: started, "sampling")

    people.stub.Cancel(cancel_request(job_id))
    go_on.set()

    assert people.wait(job_id).state == "cancelled"
    wait_until(
        lambda: not [ref for agent in people.agents for ref in agent.sessions if ref.job_id == job_id],
        "the end of the workers",
    )
