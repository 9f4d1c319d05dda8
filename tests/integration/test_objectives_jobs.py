"""Whole jobs of objectives over real gRPC: rows read, planned, trained on one and two workers, scored, reloaded."""

from __future__ import annotations

import json

import pytest

from benchmarks.engine_job import EngineJob
from plutino.assets import SNIPS_DIR, TINY_LLAMA_DIR
from plutino.job.spec import parse_spec
from tests.integration.job_cases import save_small_model
from tests.integration.objective_jobs import labelled, preferences, run, snips, two_devices, write
from tests.integration.stack import losses


@pytest.fixture(scope="module")
def people(tmp_path_factory):
    yield from two_devices(tmp_path_factory)


@pytest.mark.parametrize("objective", [pytest.param("classification", marks=pytest.mark.slow), "dpo"])
def test_job_gives_the_same_bits_on_one_and_two_workers_and_its_adapter_is_reloaded(people, tmp_path, objective):
    make = labelled if objective == "classification" else preferences
    data = {"train": str(make(tmp_path / "train.jsonl", 9)), "eval": str(make(tmp_path / "eval.jsonl", 6))}
    details = [
        run(people, tmp_path, stages=stages, objective={"type": objective}, data=data, scoring={"before": True})
        for stages in (1, 2)
    ]

    assert losses(details[0]) == losses(details[1])
    assert details[0]["scores"] == details[1]["scores"]
    adapters = [(tmp_path / f"adapter{n}" / "adapter_model.safetensors").read_bytes() for n in (1, 2)]
    assert adapters[0] == adapters[1]
    card = (tmp_path / "adapter2" / "README.md").read_text()
    assert "relative difference" in card
    measured = details[1]["scores"]
    if objective == "classification":
        assert "AutoModelForSequenceClassification" in card and "num_labels=3" in card and "rows in fp32" in card
        assert measured["after"]["score"]["num_rows"] == 6
        config = json.loads((tmp_path / "adapter2" / "adapter_config.json").read_text())
        assert (config["task_type"], config["modules_to_save"]) == ("SEQ_CLS", ["score"])
    else:
        # At its start the policy is the reference: no margin, and ties prefer neither.
        assert (measured["before"]["score"]["margin"], measured["before"]["score"]["pair_accuracy"]) == (0.0, 0.5)
        assert measured["after"]["score"]["margin"] > 0


def test_packed_raw_text_is_scored_by_perplexity_on_its_own_and_on_other_text(people, tmp_path):
    texts = [{"text": f"{row['prompt']} {row['completion']}"} for row in snips(40)]
    domain, held_out = write(tmp_path / "domain.jsonl", texts[:30]), write(tmp_path / "held_out.jsonl", texts[30:])
    general = tmp_path / "general.txt"
    general.write_text("It was the best of times.\n\nIt was the worst of times.\n")
    tasks = [
        {"name": "domain", "train": str(domain), "eval": str(held_out)},
        {"name": "general", "eval": str(general)},
    ]

    detail = run(
        people,
        tmp_path,
        stages=2,
        objective={"type": "dapt"},
        data={"tasks": tasks, "max_tokens": 96, "packing": True},
        scoring={},
    )

    before, after = (detail["scores"][moment]["by_task"] for moment in ("before", "after"))
    assert {name: score["num_rows"] for name, score in after.items()} == {"domain": 10, "general": 2}
    assert after["domain"]["perplexity"] < before["domain"]["perplexity"]
    assert after["general"]["perplexity"] != before["general"]["perplexity"]


def test_mixture_whose_loss_is_over_rows_is_scored_task_by_task_each_by_its_own_metric(people, tmp_path):
    columns = {"prompt": "{text} It is", "completion": " {label}"}
    tasks = [
        {"name": "intent", "train": str(SNIPS_DIR / "train.jsonl"), "limit": 20,
         "eval": str(SNIPS_DIR / "validation.jsonl"), "eval_limit": 3},
        {"name": "labels", "train": str(labelled(tmp_path / "labels.jsonl", 5)), "columns": columns, "weight": 2,
         "eval": str(labelled(tmp_path / "held_out.jsonl", 4)), "metric": "perplexity"},
    ]  # fmt: skip

    detail = run(
        people,
        tmp_path,
        stages=2,
        objective={"type": "sft", "mean_over": "rows"},
        data={"tasks": tasks, "mixing_temperature": 2},
        scoring={"max_new_tokens": 2},
    )

    scores = detail["scores"]["after"]["by_task"]
    assert (scores["intent"]["metric"], scores["intent"]["num_rows"]) == ("exact_match", 3)
    assert (scores["labels"]["metric"], scores["labels"]["num_rows"]) == ("perplexity", 4)
    card = (tmp_path / "adapter2" / "README.md").read_text()
    assert "training of labels" in card and "labels perplexity" in card
    assert "labelled rows in fp32, the pipeline's" in card
    # Perplexity is per token all the same: what one process finds that counts tokens.
    alone = {"tasks": [{key: value for key, value in tasks[1].items() if key != "weight"}]}
    values = {"model": {"path": str(TINY_LLAMA_DIR), "dtype": "fp32"}, "data": alone, "scoring": {}}
    with EngineJob(parse_spec(values, base_dir=tmp_path)) as job:
        expected = job.score(use_adapter=False).score.perplexity
    found = detail["scores"]["before"]["by_task"]["labels"]["perplexity"]
    assert found == pytest.approx(expected, rel=1e-5)  # its rows are cut otherwise


@pytest.mark.parametrize("objective", ["regression", "reward"])
def test_numbers_and_ratings_are_learnt_scored_held_out_and_published_as_stock_peft_reads_them(
    people, tmp_path, objective
):
    texts = [row["prompt"] for row in snips(16)]
    # What is asked for can be read off the text's length.
    numbers = [float(len(text) > 45) if objective == "reward" else len(text) / 50 for text in texts]
    if objective == "regression":
        rows = [{"text": text, "label": number} for text, number in zip(texts, numbers, strict=True)]
    else:
        rows = [{"prompt": "Rate: ", "completion": t, "rating": n} for t, n in zip(texts, numbers, strict=True)]
    path = str(write(tmp_path / "rows.jsonl", rows))
    settings = {"type": objective, **({"labels": "ratings"} if objective == "reward" else {})}

    detail = run(
        people,
        tmp_path,
        stages=2,
        model={"path": str(save_small_model(tmp_path / "model")), "dtype": "fp32"},
        method={"type": "lora", "rank": 4},
        objective=settings,
        data={"train": path, "eval": path},
        scoring={},
        training={"steps": 12, "batch_size": 8, "micro_batch_size": 4, "lr": 3e-2},
    )

    before, after = (detail["scores"][moment]["score"] for moment in ("before", "after"))
    if objective == "regression":
        assert after["mse"] < before["mse"] and after["spearman"] > before["spearman"]
    else:
        assert after["auc"] > max(before["auc"], 0.7) and after["num_rows"] == 16
    config = json.loads((tmp_path / "adapter2" / "adapter_config.json").read_text())
    assert (config["task_type"], config["modules_to_save"]) == ("SEQ_CLS", ["score"])
    assert "relative difference" in (tmp_path / "adapter2" / "README.md").read_text()
