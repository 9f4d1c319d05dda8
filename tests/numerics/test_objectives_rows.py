"""Means over rows, all of one weight or by the roots of their lengths: formula, packing, cuts, published adapter."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import peft
import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from benchmarks.engine_job import EngineJob
from coordinator.artifacts.verify import check_reload
from coordinator.artifacts.verify_process import Probe, ProbeRows
from plutino.assets import TINY_LLAMA_DIR
from plutino.errors import ExportError
from plutino.job.objective import SftConfig
from plutino.job.spec import parse_spec
from tests.numerics.objective_cases import packed, unpacked
from tests.numerics.pipelines import make_rows, make_spec, padded, pipeline_of, stages_of

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

BY_ROW = SftConfig(mean_over="rows")


def unequal_rows(seed):
    """Five rows of 1 to 8 label tokens, with two turns in the last but one, and none in the last."""
    rows = make_rows(seed, 5, num_tokens=9)
    masks = [np.arange(length) >= first for length, first in zip(rows.lengths, (1, 3, 2, 3, 99), strict=True)]
    masks[3][-1] = masks[3][0] = False
    masks[3][1] = True
    return replace(rows, label_mask=np.concatenate(masks).astype(np.uint8), length_discount=1.0)


def by_formula(model, rows, mean_over):
    """Sum over rows of the mean over their own label tokens by the row's weight, and the sum of these weights."""
    ids, labels, mask = padded(rows)
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    terms, weights = [], []
    for row in range(len(ids)):
        where = [t for t in range(1, ids.shape[1]) if labels[row, t] != -100]
        if where:
            weights.append(math.sqrt(len(where)) if mean_over == "roots" else 1)
            own_mean = torch.stack([cross_entropy(logits[row, t - 1], ids[row, t]) for t in where]).mean()
            terms.append(weights[-1] * own_mean)
    return torch.stack(terms).sum(), sum(weights)


@pytest.fixture(scope="module")
def trained(model_dirs):
    """A pipeline's spec, an adapter that differs from its start, and its configuration."""
    spec = make_spec(model_dirs["llama"]).model_copy(update={"objective": BY_ROW})
    with pipeline_of(spec, stages_of(1)) as pipeline:
        generator = torch.Generator().manual_seed(11)
        state = {
            name: value + 0.05 * torch.randn(value.shape, generator=generator)
            for name, value in sorted(pipeline.state().items())
        }
        config = next(iter(pipeline.executors.values())).method.peft_config()
    return spec, state, config


def step_of(trained, rows, weight, num_stages=2):
    """Loss sum and gradients of one step."""
    spec, state, _ = trained
    with pipeline_of(spec, stages_of(num_stages)) as pipeline:
        for executor in pipeline.executors.values():
            executor.method.load(state)
        outcomes = pipeline.train_step(0, rows, float(weight))
        gradients = {k: v.clone() for executor in pipeline.executors.values() for k, v in executor._gradients.items()}
        return sum(outcome.loss_sum for outcome in outcomes.values()), gradients


@pytest.mark.parametrize(("mean_over", "discount"), [("rows", 1.0), ("roots", 0.5)])
def test_loss_and_gradients_are_those_of_the_formula_on_stock_peft(model_dirs, trained, mean_over, discount):
    micro_batches = [replace(unequal_rows(seed), length_discount=discount) for seed in (5, 6)]
    _, state, config = trained
    keys = ("task_type", "r", "lora_alpha", "target_modules")
    base = AutoModelForCausalLM.from_pretrained(model_dirs["llama"])
    stock = peft.get_peft_model(base, peft.LoraConfig(**{key: config[key] for key in keys})).eval()
    peft.set_peft_model_state_dict(stock, state)
    terms = [by_formula(stock, rows, mean_over) for rows in micro_batches]
    weight = sum(of_rows for _, of_rows in terms)
    (sum(loss for loss, _ in terms) / weight).backward()
    expected = {name.replace(".default", ""): p.grad for name, p in stock.named_parameters() if p.requires_grad}

    loss_sum, gradients = step_of(trained, micro_batches, weight)

    assert weight == 8 if mean_over == "rows" else weight > 8
    assert loss_sum == pytest.approx(float(sum(loss.detach() for loss, _ in terms)), rel=1e-6)
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6)
    by_token = step_of(trained, [replace(rows, length_discount=0.0) for rows in micro_batches], weight)
    assert by_token[0] != pytest.approx(loss_sum, rel=1e-2)


@pytest.mark.parametrize("num_stages", [1, 3])
def test_documents_of_a_packed_row_count_as_rows_of_their_own(trained, num_stages):
    """Other shapes sum in another order, hence the tolerance."""
    rows = [replace(packed(*(make_rows(10 * m + row, 3) for row in range(2))), length_discount=1.0) for m in range(2)]
    num_documents = sum(len(each.segment_lengths) for each in rows)

    together = step_of(trained, rows, num_documents, num_stages)
    apart = step_of(trained, [unpacked(each) for each in rows], num_documents, num_stages)

    assert together[0] == pytest.approx(apart[0], rel=1e-5)
    for name, gradient in together[1].items():
        torch.testing.assert_close(gradient, apart[1][name], rtol=1e-5, atol=1e-6)


def test_no_cut_into_micro_batches_changes_what_rows_count_by(trained):
    whole = unequal_rows(7)
    borders = np.cumsum(whole.lengths)[:-1]
    alone = [
        replace(
            whole,
            lengths=np.array([len(ids)], np.int32),
            input_ids=ids,
            label_mask=mask,
            padded_tokens=len(ids),
            sample_indices=(row,),
        )
        for row, (ids, mask) in enumerate(
            zip(np.split(whole.input_ids, borders), np.split(whole.label_mask, borders), strict=True)
        )
    ]

    together, apart = step_of(trained, [whole], 4), step_of(trained, alone, 4)

    assert apart[0] == pytest.approx(together[0], rel=1e-6)
    for name, gradient in together[1].items():
        torch.testing.assert_close(apart[1][name], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("objective", "discount", "weight", "said"),
    [(BY_ROW, 1.0, 4.0, "4 labelled rows"), (SftConfig(mean_over="roots"), 0.5, None, "roots of label tokens")],
)
def test_what_is_published_is_held_against_the_same_mean(
    model_dirs, trained, tmp_path, objective, discount, weight, said
):
    spec, state, config = trained
    rows = replace(unequal_rows(8), length_discount=discount)
    counts = [mask[1:].sum() for mask in np.split(rows.label_mask, np.cumsum(rows.lengths)[:-1])]
    weight = weight or float(np.sqrt(counts).sum())
    with pipeline_of(spec, stages_of(3)) as pipeline:
        for executor in pipeline.executors.values():
            executor.method.load(state)
        loss_sum = pipeline.evaluate(0, [rows])
    keys = ("task_type", "r", "lora_alpha", "target_modules")
    base = AutoModelForCausalLM.from_pretrained(model_dirs["llama"])
    stock = peft.get_peft_model(base, peft.LoraConfig(**{key: config[key] for key in keys}))
    peft.set_peft_model_state_dict(stock, state)
    stock.save_pretrained(tmp_path)
    counted = {"loss_sum": loss_sum, "num_counted": weight, "objective": objective}
    probe = Probe(micro_batches=(ProbeRows.of(rows),), dtype="fp32", **counted)

    assert f"{said} in fp32" in check_reload(model_dirs["llama"], tmp_path, probe)[1]
    with pytest.raises(ExportError, match=f"{said} but the pipeline counted"):
        check_reload(model_dirs["llama"], tmp_path, probe.model_copy(update={"num_counted": weight + 1}))
    with pytest.raises(ExportError, match="does not do what was trained"):
        by_token = probe.model_copy(update={"objective": None, "num_counted": int(rows.label_mask.sum())})
        check_reload(model_dirs["llama"], tmp_path, by_token)


def test_held_out_loss_is_over_rows_and_perplexity_over_tokens(tmp_path):
    """On rows read from a file: each row's own mean, measured alone, against all of them together."""
    answers = ["Play", "Get the weather of the day after tomorrow", "Add it to a playlist"]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": "What is it?", "completion": f" {text}"}) for text in answers))
    values = {
        "model": {"path": str(TINY_LLAMA_DIR), "dtype": "fp32"},
        "data": {"train": str(path), "eval": str(path)},
        "training": {"steps": 1, "batch_size": 3},
        "scoring": {"metric": "perplexity"},
    }
    spec = parse_spec(values, base_dir=tmp_path)

    with EngineJob(spec) as job:
        by_token, perplexity = job.evaluate(), job.score().score.perplexity
        alone = [job.evaluate(row, row + 1) for row in range(3)]
    with EngineJob(spec.model_copy(update={"objective": BY_ROW})) as job:
        assert job.evaluate() == pytest.approx(np.mean(alone), rel=1e-5)
        assert job.score().score.perplexity == perplexity == pytest.approx(np.exp(by_token), rel=1e-6)
        assert job.train()[0] == pytest.approx(np.mean(alone), rel=1e-5)
    assert by_token != pytest.approx(np.mean(alone), rel=1e-2)
