"""Whole jobs of models with an encoder over real gRPC: rows read, planned, trained on one and two workers, reloaded."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from plutino.job.spec import parse_spec
from tests.integration.stack import People, ThreadAgent, ThreadCoordinator, losses, wait_until
from tests.numerics.tiny_families import save_model

WORDS = [
    "the",
    "cat",
    "sat",
    "on",
    "a",
    "mat",
    "and",
    "dog",
    "ran",
    "off",
    "it",
    "was",
    "not",
    "there",
    "who",
    "knows",
    "why",
    "yes",
    "no",
]
SPECIAL = {"bert": ("[PAD]", "[CLS]", "[SEP]"), "roberta": ("<pad>", "<s>", "</s>")}


def save_folder(name: str, folder: Path) -> Path:
    """A tiny model with a tokenizer of whole words, whose special tokens stand as published ones do."""
    pad, start, end = SPECIAL[name]
    # RoBERTa's pad is 1, and its positions begin behind it.
    first = [start, pad, end] if name == "roberta" else [pad, start, end]
    vocab = {word: index for index, word in enumerate([*first, "[UNK]", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens([*first, "[UNK]"])
    pair = f"{start} $A {end} $B:1 {end}:1" if name == "bert" else f"{start} $A {end} {end} $B {end}"
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{start} $A {end}", pair=pair, special_tokens=[(start, vocab[start]), (end, vocab[end])]
    )
    save_model(name, folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def labelled(path: Path, num_rows: int, *, numbers: bool) -> Path:
    rows = [
        {
            "sentence1": " ".join(WORDS[(row * 3 + word) % len(WORDS)] for word in range(3 + row % 5)),
            "sentence2": " ".join(WORDS[(row * 5 + word) % len(WORDS)] for word in range(2 + row % 3)),
            "label": row / 4 if numbers else ("same", "other")[row % 2],
        }
        for row in range(num_rows)
    ]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


@pytest.fixture(scope="module")
def people(tmp_path_factory: pytest.TempPathFactory):
    with ExitStack() as stack:
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        coordinator = ThreadCoordinator(tmp_path_factory.mktemp("state"))
        stack.callback(coordinator.close)
        people = People(coordinator.endpoints.people_address)
        stack.callback(people.close)
        for index in range(2):
            agent = ThreadAgent(coordinator.endpoints.devices_address, f"device{index}")
            stack.callback(agent.close)
        wait_until(lambda: len(people.devices()) == 2, "both agents attached")
        yield people


def run(people, folder, model, *, stages, **parts):
    values = {
        "model": {"path": str(model), "dtype": "fp32"},
        "training": {"steps": 3, "batch_size": 4, "micro_batch_size": 2, "lr": 2e-3},
        "placement": {"stages": stages},
        "output": {"dir": str(folder / f"adapter{stages}")},
        **parts,
    }
    job_id = people.submit(parse_spec(values, base_dir=folder))
    assert people.wait(job_id).state == "succeeded", people.job(job_id)
    return people.detail(job_id)


@pytest.mark.parametrize(("name", "objective"), [("bert", "classification"), ("roberta", "regression")])
def test_pairs_of_texts_give_the_same_bits_on_one_and_two_workers_and_reload(people, tmp_path, name, objective):
    model = save_folder(name, tmp_path / "model")
    numbers = objective == "regression"
    data = {
        "train": str(labelled(tmp_path / "train.jsonl", 9, numbers=numbers)),
        "eval": str(labelled(tmp_path / "eval.jsonl", 6, numbers=numbers)),
        "max_tokens": 12,
    }
    details = [
        run(people, tmp_path, model, stages=stages, objective={"type": objective}, data=data, scoring={})
        for stages in (1, 2)
    ]

    assert losses(details[0]) == losses(details[1])
    assert details[0]["scores"] == details[1]["scores"]
    adapters = [(tmp_path / f"adapter{n}" / "adapter_model.safetensors").read_bytes() for n in (1, 2)]
    assert adapters[0] == adapters[1]
    # transformers itself, with peft and the same token types, came to the same loss.
    assert "relative difference" in (tmp_path / "adapter2" / "README.md").read_text()
    config = json.loads((tmp_path / "adapter2" / "adapter_config.json").read_text())
    assert (config["task_type"], config["modules_to_save"]) == ("SEQ_CLS", ["classifier"])
