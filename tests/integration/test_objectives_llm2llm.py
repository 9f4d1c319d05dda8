"""LLM2LLM over real gRPC with a recorded teacher: rounds, a restart in the middle of one, and what the cache keeps."""

from __future__ import annotations

import asyncio
import json
import threading
from contextlib import ExitStack

import pytest
from typer.testing import CliRunner

from coordinator import cli
from coordinator.llm2llm.teachers import recorded
from edge_node.weights_config import WeightsConfig
from plutino.assets import SNIPS_DIR
from plutino.client import Client
from plutino.errors import InvalidTransitionError
from plutino.events import StepCommitted
from plutino.llm2llm import load_loop
from tests.integration.stack import People, ThreadAgent, ThreadCoordinator, losses, wait_until

JOB = """
name: few
model: {path: MODEL, dtype: fp32}
data: {train: seed.jsonl, eval: held-out.jsonl, max_tokens: 96}
scoring: {max_new_tokens: 2, before: false}
training: {steps: 2, batch_size: 4, micro_batch_size: 2, lr: 1e-3, checkpointing: "off"}
placement: {stages: 2, threads: 1, replan: never}
"""
LOOP = """
job: job.yaml
rounds: 2
asks: 2
teacher: {type: recorded, path: answers.jsonl}
"""
SEED = [
    ("play something by Bach", "PlayMusic"),
    ("is it raining in Rome", "GetWeather"),
    ("book a table for six", "BookRestaurant"),
    ("rate this novel four stars", "RateBook"),
]
NEW = [
    "put on loud drums",
    "will snow fall tomorrow morning",
    "we need dinner near the harbour",
    "that essay gets two points",
]


def chat(prompt, answer):
    turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
    return {"messages": turns}


@pytest.fixture
def loop_file(tmp_path, small_model_dir):
    def lines(name, rows):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))

    lines("seed.jsonl", [chat(*row) for row in SEED])
    (tmp_path / "held-out.jsonl").write_text(
        "".join((SNIPS_DIR / "validation.jsonl").read_text().splitlines(keepends=True)[:4])
    )
    # A random model gets all of them wrong. The first two rows: one good answer in each round; the third: nonsense,
    # then a copy of its seed; the fourth: a good one only when it is asked again.
    replies = [
        [json.dumps(chat(NEW[0], "PlayMusic")), json.dumps(chat("louder, with bells and horns", "PlayMusic"))],
        [f"Here: {json.dumps(chat(NEW[1], 'GetWeather'))}", json.dumps(chat("how hot is Cairo at noon", "GetWeather"))],
        ["I do not know", json.dumps(chat(*SEED[2]))],
        ["", json.dumps(chat(NEW[3], "RateBook")), json.dumps(chat("a fine tale, five of six", "RateBook"))],
    ]
    lines(
        "answers.jsonl",
        [{"row": chat(*row), "reply": reply} for row, own in zip(SEED, replies, strict=True) for reply in own],
    )
    (tmp_path / "job.yaml").write_text(JOB.replace("MODEL", str(small_model_dir)))
    (tmp_path / "loop.yaml").write_text(LOOP)
    return tmp_path / "loop.yaml"


@pytest.fixture
def stack(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with ExitStack() as stack:
        yield stack


class Plutino:
    def __init__(self, state_dir):
        self.coordinator = ThreadCoordinator(state_dir)
        self.people = People(self.coordinator.endpoints.people_address)
        self.client = Client(self.coordinator.endpoints.people_address)

    def join(self, stack, weights=(None, None)):
        for index, config in enumerate(weights):
            agent = ThreadAgent(self.coordinator.endpoints.devices_address, f"device{index}", weights=config)
            stack.callback(agent.close)
        wait_until(lambda: len(self.people.devices()) == 2, "both agents attached")

    def ended(self, loop_id):
        return wait_until(lambda: (s := self.client.loops.status(loop_id)).has_ended and s, f"the end of {loop_id}")

    def close(self):
        self.people.close()
        self.client.close()
        self.coordinator.close()


def test_loop_trains_asks_and_trains_anew_and_goes_on_after_a_restart_in_the_middle_of_a_round(
    stack, tmp_path, loop_file, monkeypatch
):
    asked, hold = [], threading.Event()
    answer = recorded.RecordedAnswers.answer

    async def counting(self, asks, take):
        async def told(ask, reply):
            await take(ask, reply)
            asked.append(ask.key)

        if not hold.is_set() and len(asks) > 1:
            # The coordinator ends while the rest of the first wave is out.
            await answer(self, asks[:2], told)
            hold.set()
            await asyncio.Event().wait()
        await answer(self, asks, told)

    monkeypatch.setattr(recorded.RecordedAnswers, "answer", counting)
    first = Plutino(tmp_path / "state")
    first.join(stack)
    loop_id = first.client.loops.submit(load_loop(loop_file), idempotency_key="once")
    assert first.client.loops.submit(load_loop(loop_file), idempotency_key="once") == loop_id
    assert hold.wait(50)
    first.close()

    second = Plutino(tmp_path / "state")
    stack.callback(second.close)
    status = second.ended(loop_id)
    assert status.state == "succeeded", status
    assert len(asked) == len(set(asked)) and asked[:2] == ["0/0/0", "0/0/1"]
    assert [one.state for one in status.rounds] == ["done"] * 3
    assert [one.num_rows for one in status.rounds] == [4, 7, 9 + 1 if status.rounds[1].kept == 3 else 9]
    assert status.rounds[0].kept == 3 and status.rounds[0].asked == 6
    assert status.rounds[0].rejected == {"no row in the answer": 2, "like a known row": 1}
    assert all(one.held_out is not None and one.num_seed == 4 for one in status.rounds)
    assert status.adapter_dir is not None

    # Every round starts from the base: a plain job on its rows has its losses.
    rounds = [second.people.detail(one.job_id) for one in status.rounds]
    spec = load_loop(loop_file, [f"data.train={status.data_dir}/round-1.jsonl"]).job
    alone = second.people.submit(spec)
    assert second.people.wait(alone).state == "succeeded"
    assert losses(second.people.detail(alone)) == losses(rounds[1])
    assert [job.name for job in second.client.jobs()].count(f"{loop_id}-0") == 1

    state = ["--state-dir", str(tmp_path / "state")]
    shown = CliRunner().invoke(cli.app, ["llm2llm", loop_id[:-2], *state])
    assert "7" in shown.stdout and "adapter, verified" in shown.stdout
    told = CliRunner().invoke(cli.app, ["llm2llm", loop_id, "--rows", *state]).stdout.splitlines()
    samples = [json.loads(line) for line in told]
    assert [s["row"]["messages"][0]["content"] for s in samples if s["kept"] and s["round"] == 0] == [
        NEW[0],
        NEW[1],
        NEW[3],
    ]
    assert all(s["why"] for s in samples if not s["kept"])
    with pytest.raises(InvalidTransitionError, match="nothing to resume"):
        second.client.loops.resume(loop_id)


@pytest.mark.slow
def test_loop_whose_teacher_is_away_fails_keeps_its_training_and_is_resumed(stack, tmp_path, loop_file):
    answers = loop_file.parent / "answers.jsonl"
    text = answers.read_text()
    answers.write_text("")
    plutino = Plutino(tmp_path / "state")
    stack.callback(plutino.close)
    plutino.join(stack)
    loop = load_loop(loop_file)
    loop = loop.model_copy(update={"loop": loop.loop.model_copy(update={"rounds": 1})})
    loop_id = plutino.client.loops.submit(loop)
    status = plutino.ended(loop_id)
    assert status.state == "failed" and "answered none of 4 questions" in status.reason
    answers.write_text(text)
    plutino.client.loops.resume(loop_id)
    status = plutino.ended(loop_id)
    assert status.state == "succeeded" and [one.num_rows for one in status.rounds] == [4, 7]
    assert len(plutino.client.jobs()) == 2


@pytest.mark.slow
def test_new_rows_only_add_entries_to_the_cache_that_the_seed_has_filled(stack, tmp_path, loop_file):
    plutino = Plutino(tmp_path / "state")
    stack.callback(plutino.close)
    caches = [
        WeightsConfig(
            cache_dir=tmp_path / name,
            cache_bytes=0,
            activation_dir=tmp_path / f"{name}-cache",
            activation_bytes=1 << 26,
        )
        for name in ("one", "two")
    ]
    plutino.join(stack, caches)
    settings = ["method={type: parallel_adapters}", "training.activation_cache=bf16", "training.steps=null"]
    loop = load_loop(loop_file, [*settings, "training.micro_batch_size=1"])
    loop_id = plutino.client.loops.submit(loop.model_copy(update={"loop": loop.loop.model_copy(update={"rounds": 1})}))
    status = plutino.ended(loop_id)
    assert status.state == "succeeded" and [one.num_rows for one in status.rounds] == [4, 7], status

    def cached(job_id):
        steps = [e.event for e in plutino.client.watch(job_id) if isinstance(e.event, StepCommitted)]
        return [worker.cached_rows for worker in steps[-1].workers]

    # One epoch each: of the second round's seven rows only the three new ones ran through the blocks.
    assert [cached(one.job_id) for one in status.rounds] == [[0, 0], [4, 4]]


@pytest.mark.slow
def test_larger_model_on_the_same_devices_teaches_and_nonsense_of_it_costs_nothing(
    stack, tmp_path, loop_file, small_model_dir
):
    (loop_file.parent / "loop.yaml").write_text(
        "job: job.yaml\nrounds: 1\nasks: 1\n"
        f"teacher: {{type: pipeline, model: {{path: {small_model_dir}, dtype: fp32}}, max_new_tokens: 3}}\n"
    )
    plutino = Plutino(tmp_path / "state")
    stack.callback(plutino.close)
    plutino.join(stack)
    loop_id = plutino.client.loops.submit(load_loop(loop_file))
    status = plutino.ended(loop_id)
    # A random teacher writes no JSON: its answers are counted, and the seed alone is published.
    assert status.state == "succeeded", status
    assert status.rounds[0].asked == 4 and status.rounds[0].rejected == {"no row in the answer": 4}
    teacher = next(job for job in plutino.client.jobs() if job.name == f"{loop_id}-teacher")
    answers = plutino.people.detail(teacher.job_id)["scores"]
    assert set(answers) == {"before"} and plutino.people.detail(status.adapter_job_id)["scores"]
    assert status.adapter_dir is not None
