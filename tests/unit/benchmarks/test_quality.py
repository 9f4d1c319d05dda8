"""The benchmark of quality: scores as GLUE reports them, rows kept back, and the goal as the figures have it."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks.minilm import packed, unpacked
from benchmarks.quality import gaps, table_text
from benchmarks.quality_tasks import OTHERS, class_names, write_task
from benchmarks.quality_training import headline, positive_f1
from coordinator.jobs.scoring import RowVerdict


def verdicts(answers, truths):
    rows = enumerate(zip(answers, truths, strict=True))
    return [RowVerdict(row=row, is_right=answer == truth, answer=answer) for row, (answer, truth) in rows]


def test_f1_is_that_of_the_positive_class():
    # 2 found rightly, 1 wrongly, 1 missed.
    assert positive_f1(verdicts("11100", "11010")) == pytest.approx(2 * 2 / (2 * 2 + 1 + 1))
    assert positive_f1(verdicts("00", "11")) == 0.0


def test_a_task_with_two_measures_counts_by_their_mean():
    assert headline({"accuracy": 0.8, "macro_f1": 0.1, "f1": 0.9}) == pytest.approx(0.85)
    assert headline({"pearson": 0.9, "spearman": 0.8, "mse": 3.0}) == pytest.approx(0.85)
    assert headline({"accuracy": 0.7, "macro_f1": 0.1}) == 0.7


def test_learning_rates_are_chosen_by_training_rows_that_are_kept_back(tmp_path):
    folder = tmp_path / "mrpc"
    folder.mkdir()
    for name, num_rows in (("train", 40), ("dev", 8)):
        rows = [{"s1": f"{name} {row}", "s2": "b", "label": row % 2} for row in range(num_rows)]
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    files = write_task("mrpc", tmp_path, tmp_path)
    texts = {
        part: [json.loads(line)["text"] for line in getattr(files, part).read_text().splitlines()]
        for part in ("train", "held_out", "search_train", "search_held_out")
    }

    assert texts["search_train"] + texts["search_held_out"] == texts["train"]
    assert len(texts["search_held_out"]) == 4 and len(set(texts["train"])) == 40
    assert texts["train"] != sorted(texts["train"], key=lambda text: int(text.split()[1]))
    assert all(text.startswith("dev") for text in texts["held_out"])
    assert class_names(files) == ("0", "1")


def entries(**means):
    return {
        name.replace("_", " "): {
            "epochs": 4.0,
            "lr": 1e-3,
            "is_at_the_edge": False,
            "trained_share": 0.04,
            "runs": [{"score": (mean + off) / 100, "processor_s": 1.0, "device": "cpu"} for off in (-1, 0, 1)],
        }
        for name, mean in means.items()
    }


def test_gap_is_to_the_mean_of_the_others_and_waits_for_all_of_them():
    found = entries(full=90.0, houlsby=89.0, lora=91.0, parallel_adapters=89.8)

    assert gaps(found) == {"parallel adapters": pytest.approx(0.2)}
    text = table_text("m", "mrpc", found, {"other": "no such family"})
    assert "| 89.80 ± 1.00 | 3 " in text and "0.20 points below the mean of the others; goal met" in text
    assert "other is left out: no such family" in text
    assert "goal missed" in table_text("m", "mrpc", found | entries(lora=93.0), {})
    for name in OTHERS:
        assert gaps({other: entry for other, entry in found.items() if other != name}) == {}


def test_packed_weights_come_back_within_half_a_step_of_their_row():
    generator = torch.Generator().manual_seed(3)
    tensors = {
        "embeddings.word_embeddings.weight": torch.randn(6, 5, generator=generator),
        "encoder.weight": torch.randn(4, 5, generator=generator) * torch.tensor([[1e-3], [1.0], [0.0], [10.0]]),
        "encoder.bias": torch.randn(5, generator=generator),
    }
    back = unpacked(packed(tensors, used={0, 3}))

    assert back.keys() == tensors.keys()
    assert torch.equal(back["encoder.bias"], tensors["encoder.bias"])
    table = back["embeddings.word_embeddings.weight"]
    assert torch.equal(table[[1, 2, 4, 5]], torch.zeros(4, 5))
    for found, given in (
        (table[[0, 3]], tensors["embeddings.word_embeddings.weight"][[0, 3]]),
        (back["encoder.weight"], tensors["encoder.weight"]),
    ):
        step = given.abs().amax(1, keepdim=True) / 127
        assert bool(((found - given).abs() <= step / 2 * 1.001).all())
