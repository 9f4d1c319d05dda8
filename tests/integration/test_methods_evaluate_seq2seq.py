"""Rows answered and scored with adapters of encoder-decoders, several on one base, beside plain transformers."""

from __future__ import annotations

import json
import math

import peft
import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from transformers import AutoModelForSeq2SeqLM

from edge_node.methods.registry import METHODS
from plutino.events import WorkerLoaded
from plutino.job.method import AdaptersConfig, ParallelAdaptersConfig
from plutino.load_adapter import load_adapter
from tests.integration.test_encoder_jobs import WORDS, save_folder
from tests.integration.test_methods_evaluate import evaluate
from tests.integration.test_methods_sweep import agents_of, stack, start
from tests.numerics.chain import build_chain

__all__ = ["stack"]

TEXTS = [" ".join(WORDS[n : n + 3]) for n in range(0, 12, 3)]
TRUTHS = [WORDS[5], " ".join(WORDS[1:4])]
TARGETS = {"t5": ["q", "wo"], "bart": ["q_proj", "fc2"]}
OURS = {"bottlenecks": AdaptersConfig(bottleneck=5, blocks=(1, 2)), "side": ParallelAdaptersConfig(reduction=2)}


def base_of(name, folder):
    """A model whose answers depend on what it is asked: as it comes, BART's head sees its start token above all."""
    base = save_folder(name, folder)
    model = AutoModelForSeq2SeqLM.from_pretrained(base)
    torch.manual_seed(2)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if name == "bart" and "layers" in key and parameter.dim() == 2:
                parameter.add_(torch.randn_like(parameter))
    model.save_pretrained(base)
    return base


def adapters_of(name, base, folder):
    """One of stock peft, in the last block of either half, and two of ours; every tensor of them random."""
    torch.manual_seed(1)
    config = peft.LoraConfig(task_type="SEQ_2_SEQ_LM", r=2, target_modules=TARGETS[name], layers_to_transform=[1])
    model = peft.get_peft_model(AutoModelForSeq2SeqLM.from_pretrained(base), config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.7)
    model.save_pretrained(folder / "lora")
    for kind, method in OURS.items():
        (stage,) = build_chain(base, 1, attention=None)
        attached = METHODS[method.type](stage, method, seed=1)
        (folder / kind).mkdir()
        values = {key: value + 0.5 * torch.randn_like(value) for key, value in sorted(attached.state().items())}
        save_file(values, folder / kind / "adapter_model.safetensors")
        (folder / kind / "adapter_config.json").write_text(json.dumps(attached.peft_config()))
    return {kind: folder / kind for kind in ("lora", *OURS)}


def alone(base, folder):
    """One adapter over plain transformers: what it answers to each text, and its perplexity on rows with answers."""
    model = AutoModelForSeq2SeqLM.from_pretrained(base, dtype=torch.float32).eval()
    if folder is not None and folder.name == "lora":
        model = peft.PeftModel.from_pretrained(model, str(folder))
    elif folder is not None:
        load_adapter(model, folder)
    tokenizer, answers, losses = Tokenizer.from_file(str(base / "tokenizer.json")), [], []
    for text in TEXTS:
        ids = torch.tensor([tokenizer.encode(text).ids])
        found = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False)
        answers.append(tokenizer.decode(found[0].tolist()))
    for text, truth in zip(TEXTS, TRUTHS, strict=False):
        ids, labels = (torch.tensor([tokenizer.encode(each).ids]) for each in (text, truth))
        with torch.no_grad():
            losses.append((float(model(input_ids=ids, labels=labels).loss), labels.numel()))
    total = sum(loss * number for loss, number in losses)
    return answers, math.exp(total / sum(number for _, number in losses))


@pytest.mark.parametrize(
    ("name", "kinds", "scored_kinds"),
    [
        ("t5", ("lora", "side"), ("lora",)),
        pytest.param("t5", ("lora", *OURS), (None, "lora", *OURS), marks=pytest.mark.slow),
        pytest.param("bart", ("lora", *OURS), (None, "lora", *OURS), marks=pytest.mark.slow),
    ],
)
def test_each_adapter_answers_and_scores_as_alone_over_a_base_that_is_loaded_once(
    stack, tmp_path, name, kinds, scored_kinds
):
    base = base_of(name, tmp_path / "base")
    places = {kind: place for kind, place in adapters_of(name, base, tmp_path).items() if kind in kinds}
    coordinator, people, client = start(stack, tmp_path / "state")
    for one in (coordinator, people, client):
        stack.callback(one.close)
    agents_of(stack, coordinator, people)
    names = [None, *places]
    options = [f"--adapter={kind}={place}" for kind, place in places.items()]
    options += [f"--model={base}", "--set=placement.stages=2", "--set=placement.threads=1", "--set=model.dtype=fp32"]

    def asked(names, texts, truths, *arguments):
        rows = [
            {"prompt": text, **({"adapter": kind} if kind else {}), **({"completion": truth} if truth else {})}
            for text, truth in zip(texts, truths, strict=True)
            for kind in names
        ]
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        told = evaluate(tmp_path / "state", path, *options, *arguments)
        assert told.exit_code == 0, told.output
        return json.loads(told.stdout)

    answered = asked(names, TEXTS, [None] * len(TEXTS), "--max-new-tokens=4")
    scored = asked(scored_kinds, TEXTS[:2], TRUTHS, "--metric=perplexity")

    for kind in names:
        answers, perplexity = alone(base, places.get(kind))
        found = [row["answer"] for row in answered["rows"] if row["adapter"] == (kind or "base")]
        assert found == answers, kind
        if kind in scored_kinds:
            one = scored["adapters"][kind or "base"]
            assert (one["num_rows"], one["perplexity"]) == (2, pytest.approx(perplexity, rel=1e-5)), kind
    assert scored["rows"] == []
    assert len({one["perplexity"] for one in scored["adapters"].values()}) == len(scored_kinds)
    answers = {tuple(r["answer"] for r in answered["rows"] if r["adapter"] == (kind or "base")) for kind in names}
    assert len(answers) == len(names), "adapters that change nothing prove nothing"
    events = [[e.event for e in client.watch(one["job_id"])] for one in answered["adapters"].values()]
    read = [sum(e.tensors_read for e in own if isinstance(e, WorkerLoaded)) for own in events]
    assert read[0] > 0 and read[1:] == [0] * len(places)
