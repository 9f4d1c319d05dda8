from __future__ import annotations

import json
from pathlib import Path

from coordinator.artifacts.verify_process import VerifyReport
from coordinator.jobs.runner_stream import _Answers
from plutino.assets import TINY_LLAMA_DIR
from plutino.job.spec import parse_spec
from protos import runners_pb2 as pb


def test_verification_begins_when_the_last_step_is_near_and_knows_the_base(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(
        "\n".join(json.dumps({"prompt": f"{i}?", "completion": "x"}) for i in range(6))
    )
    values = {
        "model": {"path": str(TINY_LLAMA_DIR)},
        "data": {"train": str(tmp_path / "rows.jsonl")},
        "training": {"epochs": 1, "batch_size": 2},
    }
    begun: list[tuple[int, Path]] = []
    asked: list[int] = []
    server = _Answers("nowhere", lambda _: VerifyReport(), None, None, lambda base: begun.append((asked[-1], base)))
    spec_json = parse_spec(values, base_dir=tmp_path).model_dump_json()

    (prepared,) = server.answer(pb.RunnerCommand(prepare=pb.Prepare(spec_json=spec_json)))
    for step in range(3):
        asked.append(step)
        parts = list(server.answer(pb.RunnerCommand(get_train_batch=pb.GetTrainBatch(step=step, micro_batch_size=1))))
        assert len(parts) == 2

    assert json.loads(prepared.prepared.json)["total_steps"] == 3
    assert begun == [(1, TINY_LLAMA_DIR), (2, TINY_LLAMA_DIR)]


def test_rows_of_a_step_are_cut_as_the_question_says(tmp_path: Path) -> None:
    prompts = ["a b c d " * 6, *["a b c d"] * 5]
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(json.dumps({"prompt": prompt, "completion": "x"}) for prompt in prompts))
    values = {
        "model": {"path": str(TINY_LLAMA_DIR)},
        "data": {"train": str(rows)},
        "training": {"epochs": 1, "batch_size": 6},
    }
    server = _Answers("nowhere", lambda _: VerifyReport(), None, None, lambda base: None)
    spec_json = parse_spec(values, base_dir=tmp_path).model_dump_json()
    list(server.answer(pb.RunnerCommand(prepare=pb.Prepare(spec_json=spec_json))))

    def rows_by(cut: str) -> list[int]:
        ask = pb.GetTrainBatch(step=0, micro_batch_size=2, micro_batch_cut=cut)
        return [len(event.batch_part.rows.lengths) for event in server.answer(pb.RunnerCommand(get_train_batch=ask))]

    assert rows_by("rows") == [2, 2, 2]
    assert rows_by("tokens") == [1, 3, 2]
