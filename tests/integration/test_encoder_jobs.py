"""Whole jobs of models with an encoder over real gRPC: rows read, planned, trained on one and two workers, reloaded."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
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
SPECIAL = {
    "bert": ("[PAD]", "[CLS]", "[SEP]"),
    "roberta": ("<pad>", "<s>", "</s>"),
    "t5": ("<pad>", "", "</s>"),
    "bart": ("<pad>", "<s>", "</s>"),
}


def save_folder(name: str, folder: Path) -> Path:
    """A tiny model with a tokenizer of whole words, whose special tokens stand as published ones do."""
    pad, start, end = SPECIAL[name]
    # Their pad is 1, and RoBERTa's positions begin behind it.
    first = [start, pad, end] if name in ("roberta", "bart") else [one for one in (pad, start, end) if one]
    vocab = {word: index for index, word in enumerate([*first, "[UNK]", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens([*first, "[UNK]"])
    pair = f"{start} $A {end} $B:1 {end}:1" if name == "bert" else f"{start} $A {end} {end} $B {end}"
    if name == "t5":
        pair = f"$A {end} $B {end}"
    ends = [(token, vocab[token]) for token in (start, end) if token]
    single = f"{start} $A {end}".strip()
    tokenizer.post_processor = processors.TemplateProcessing(single=single, pair=pair, special_tokens=ends)
    save_model(name, folder, **({"eos_token_id": vocab[end]} if name in ("t5", "bart") else {}))
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


def assert_alike(details, folders):
    adapters = [(folder / "adapter_model.safetensors").read_bytes() for folder in folders]
    for detail, adapter in zip(details, adapters, strict=True):
        assert losses(detail) == losses(details[0])
        assert detail["scores"] == details[0]["scores"]
        assert adapter == adapters[0]


@pytest.mark.parametrize(
    ("name", "objective", "numbers_of_workers"),
    [
        ("bert", "classification", (2,)),
        pytest.param("bert", "regression", (1, 2), marks=pytest.mark.slow),
        pytest.param("roberta", "classification", (1, 2), marks=pytest.mark.slow),
    ],
)
def test_pairs_of_texts_give_the_same_bits_on_any_number_of_workers_and_reload(
    people, tmp_path, name, objective, numbers_of_workers
):
    model = save_folder(name, tmp_path / "model")
    numbers = objective == "regression"
    data = {
        "train": str(labelled(tmp_path / "train.jsonl", 9, numbers=numbers)),
        "eval": str(labelled(tmp_path / "eval.jsonl", 6, numbers=numbers)),
        "max_tokens": 12,
    }
    details = [
        run(people, tmp_path, model, stages=stages, objective={"type": objective}, data=data, scoring={})
        for stages in numbers_of_workers
    ]

    assert_alike(details, [tmp_path / f"adapter{number}" for number in numbers_of_workers])
    # transformers itself, with peft and the same token types, came to the same loss.
    assert "relative difference" in (tmp_path / "adapter2" / "README.md").read_text()
    config = json.loads((tmp_path / "adapter2" / "adapter_config.json").read_text())
    assert (config["task_type"], config["modules_to_save"]) == ("SEQ_CLS", ["classifier"])


def test_an_encoder_decoder_learns_instructed_tasks_with_the_same_bits_on_one_and_two_workers(people, tmp_path):
    model = save_folder("t5", tmp_path / "model")
    for name, num_rows in (("train", 9), ("eval", 5)):
        rows = [
            {
                "prompt": " ".join(WORDS[(row * 3 + word) % len(WORDS)] for word in range(3 + row % 5)),
                "completion": " ".join(WORDS[(row + word) % len(WORDS)] for word in range(1 + row % 3)),
            }
            for row in range(num_rows)
        ]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    files = {"train": str(tmp_path / "train.jsonl"), "eval": str(tmp_path / "eval.jsonl")}
    # As T5 was trained: each task has its own instruction before the text.
    tasks = [
        {"name": name, **files, "format": "prompt_completion", "columns": {"prompt": f"{word} {{prompt}}"}}
        for name, word in zip(("first", "second"), WORDS, strict=False)
    ]
    data = {"tasks": tasks, "max_tokens": 16, "mixing_temperature": 2}
    details = [
        run(
            people,
            tmp_path,
            model,
            stages=stages,
            objective={"type": "seq2seq"},
            data=data,
            scoring={"max_new_tokens": 4, "before": True},
        )
        for stages in (1, 2)
    ]

    assert losses(details[0]) == losses(details[1])
    assert details[0]["scores"] == details[1]["scores"]
    by_task = details[-1]["scores"]["after"]["by_task"]
    assert {name: one["metric"] for name, one in by_task.items()} == dict.fromkeys(("first", "second"), "exact_match")
    adapters = [(tmp_path / f"adapter{n}" / "adapter_model.safetensors").read_bytes() for n in (1, 2)]
    assert adapters[0] == adapters[1]
    card = (tmp_path / "adapter2" / "README.md").read_text()
    assert "relative difference" in card and "AutoPeftModelForSeq2SeqLM" in card
    config = json.loads((tmp_path / "adapter2" / "adapter_config.json").read_text())
    assert config["task_type"] == "SEQ_2_SEQ_LM"


@pytest.mark.slow
@pytest.mark.parametrize("method", ["full", "adapters"])
def test_t5_trained_in_full_or_with_adapters_is_published_alike_by_any_number_of_workers(people, tmp_path, method):
    model = save_folder("t5", tmp_path / "model")
    rows = [{"prompt": " ".join(WORDS[row : row + 4]), "completion": WORDS[row]} for row in range(8)]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    details = [
        run(
            people,
            tmp_path,
            model,
            stages=stages,
            objective={"type": "seq2seq"},
            method={"type": method},
            data={"train": str(tmp_path / "train.jsonl"), "max_tokens": 16},
        )
        for stages in (1, 2)
    ]

    assert losses(details[0]) == losses(details[1])
    found = [published(tmp_path / f"adapter{stages}") for stages in (1, 2)]
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())
    card = (tmp_path / "adapter2" / "README.md").read_text()
    assert "relative difference" in card and "AutoModelForSeq2SeqLM" in card
    assert ("load_adapter" in card) == (method == "adapters")


def published(folder):
    """All tensors of an adapter or of a whole model."""
    return {name: value for path in folder.glob("*.safetensors") for name, value in load_file(path).items()}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "objective"), [("t5", "seq2seq"), ("bert", "classification")])
def test_side_network_trains_from_the_cache_on_any_number_of_workers_and_reloads(people, tmp_path, name, objective):
    model = save_folder(name, tmp_path / "model")
    if objective == "seq2seq":
        rows = [{"prompt": " ".join(WORDS[row : row + 4]), "completion": WORDS[row]} for row in range(8)]
        (tmp_path / "train.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    else:
        labelled(tmp_path / "train.jsonl", 8, numbers=False)
    details = [
        run(
            people,
            tmp_path,
            model,
            stages=stages,
            objective={"type": objective},
            method={"type": "parallel_adapters", "reduction": 2},
            data={"train": str(tmp_path / "train.jsonl"), "max_tokens": 16},
            training={"steps": 6, "batch_size": 4, "micro_batch_size": 2, "lr": 2e-3, "activation_cache": "raw"},
        )
        for stages in (1, 2)
    ]

    assert losses(details[0]) == losses(details[1])
    adapters = [(tmp_path / f"adapter{n}" / "adapter_model.safetensors").read_bytes() for n in (1, 2)]
    assert adapters[0] == adapters[1]
    card = (tmp_path / "adapter2" / "README.md").read_text()
    assert "relative difference" in card and "load_adapter" in card
