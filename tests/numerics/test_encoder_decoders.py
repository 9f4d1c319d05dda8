"""Encoder-decoders split over stages, against transformers and stock peft."""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import replace
from itertools import pairwise

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import cross_entropy
from transformers import AutoModelForSeq2SeqLM

from coordinator.artifacts.probe_loss import loss_sum_of
from coordinator.artifacts.verify_process import Probe, ProbeRows
from edge_node.engine.generate import GenerateOptions
from edge_node.stage.build import build_stage
from edge_node.stage.weights import LocalSource
from partitioner.adapter import adapter_params_of
from partitioner.memory import stage_memory
from partitioner.shape import JobShape
from plutino.data.batches import MicroBatchRows
from plutino.errors import ConfigError
from plutino.job.method import LoraConfig, PrefixConfig
from plutino.job.objective import Seq2SeqConfig, SftConfig
from tests.numerics.chain import CUTS
from tests.numerics.pipelines import assert_same_tensors, make_batches, make_rows, make_spec, pipeline_of, stages_of
from tests.numerics.pipelines import train as train_steps
from tests.numerics.tiny_families import ENCODER_DECODERS, describe_folder, make_model, save_model
from tests.sampling import sampled

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    return {name: save_model(name, tmp_path_factory.mktemp(name)) for name in ENCODER_DECODERS}


def spec_of(folder, objective=None, **method):
    spec = make_spec(folder, **({"rank": 2, "target_modules": "all-linear"} | method))
    return spec.model_copy(update={"objective": objective or Seq2SeqConfig()})


def two_texts(rows: MicroBatchRows, config) -> dict[str, torch.Tensor]:
    """Rows as transformers takes them: sources and labels, each padded on the right."""
    sources, targets, start = [], [], 0
    for length in rows.lengths.tolist():
        ids = torch.from_numpy(rows.input_ids[start : start + length]).long()
        mask = torch.from_numpy(rows.label_mask[start : start + length]).bool()
        sources.append(ids[~mask])
        targets.append(ids[mask])
        start += length
    pad = torch.nn.utils.rnn.pad_sequence
    attention = pad([torch.ones_like(ids) for ids in sources], batch_first=True)
    return {
        "input_ids": pad(sources, batch_first=True, padding_value=config.pad_token_id),
        "attention_mask": attention,
        "labels": pad(targets, batch_first=True, padding_value=-100),
    }


def full_rows(seed: int) -> MicroBatchRows:
    """Rows of one length: no padding in either text."""
    rows = make_rows(seed, 3, num_tokens=9)
    mask = np.tile(np.arange(9) >= 6, 3).astype(np.uint8)
    ids = np.random.default_rng(seed).integers(3, 61, 27).astype(np.int32)
    return replace(rows, lengths=np.full(3, 9, np.int32), input_ids=ids, label_mask=mask)


def stock_model(folder, config):
    keys = ("task_type", "r", "lora_alpha", "target_modules")
    return peft.get_peft_model(
        AutoModelForSeq2SeqLM.from_pretrained(folder), peft.LoraConfig(**{key: config[key] for key in keys})
    ).eval()


# A cut inside the encoder, a stage of both halves, one inside the decoder.
SPLITS = [(name, num, is_padded) for name in ENCODER_DECODERS for num in (1, 2, 3, 4) for is_padded in (False, True)]


@pytest.mark.parametrize(
    ("name", "num_stages", "is_padded"),
    sampled(SPLITS, 4, always=(("t5", 3, True), ("t5_gated", 4, False), ("bart", 4, True), ("bart", 3, False))),
)
def test_split_gives_the_whole_models_loss_and_gradients_bit_for_bit(folders, name, num_stages, is_padded):
    rows = make_rows(5, 3) if is_padded else full_rows(5)
    weight = float(rows.label_mask.sum())
    with pipeline_of(spec_of(folders[name]), stages_of(num_stages)) as pipeline:
        generator = torch.Generator().manual_seed(11)
        values = {
            key: value + 0.05 * torch.randn(value.shape, generator=generator)
            for key, value in sorted(pipeline.state().items())
        }
        gradients = {}
        for executor in pipeline.executors.values():
            executor.method.load(values)
        outcomes = pipeline.train_step(0, [rows], weight)
        for executor in pipeline.executors.values():
            gradients |= {key: value.clone() for key, value in executor._gradients.items()}
        config = next(iter(pipeline.executors.values())).method.peft_config()
        model_config = next(iter(pipeline.executors.values())).stage.config
    stock = stock_model(folders[name], config)
    peft.set_peft_model_state_dict(stock, values)
    inputs = two_texts(rows, model_config)
    logits = stock(**inputs).logits
    labels = inputs["labels"]
    # As the objective does: only positions with a label, in their order.
    loss = cross_entropy(logits[labels != -100].float(), labels[labels != -100], reduction="sum")
    (loss / weight).backward()

    assert sum(outcome.loss_sum for outcome in outcomes.values()) == float(loss.detach())
    whole = {key.replace(".default", ""): p.grad for key, p in stock.named_parameters() if p.requires_grad}
    assert_same_tensors(gradients, whole)
    assert all(gradient.abs().max() > 0 for gradient in gradients.values())


@torch.no_grad()
def test_a_targets_tokens_share_its_rows_weight_where_the_loss_is_over_rows(folders):
    rows = replace(make_rows(5, 4), length_discount=1.0)
    with pipeline_of(spec_of(folders["t5"]), stages_of(2)) as pipeline:
        loss_sum = pipeline.evaluate(0, [rows])
        by_token = pipeline.evaluate(1, [replace(rows, length_discount=0.0)])
        model_config = next(iter(pipeline.executors.values())).stage.config
    inputs = two_texts(rows, model_config)
    labels = inputs["labels"]
    model = AutoModelForSeq2SeqLM.from_pretrained(folders["t5"]).eval()
    logits = model(**inputs).logits
    tokens = cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none", ignore_index=-100).view_as(labels)
    counts = (labels != -100).sum(dim=1)

    assert len(set(counts.tolist())) > 1
    assert loss_sum == pytest.approx(float((tokens.sum(dim=1) / counts).sum()), rel=1e-5)
    assert by_token == pytest.approx(float(tokens.sum()), rel=1e-5)
    # What a published adapter is held against.
    counted = {"num_counted": len(counts), "objective": Seq2SeqConfig(mean_over="rows"), "dtype": "fp32"}
    probe = Probe(micro_batches=(ProbeRows.of(rows),), loss_sum=loss_sum, **counted)
    assert loss_sum_of(model, probe, nullcontext) == pytest.approx(loss_sum, rel=1e-5)


@pytest.mark.parametrize(
    ("name", "num_stages"),
    sampled([(name, num) for name in ENCODER_DECODERS for num in (1, 2, 3)], 2, always=(("t5", 3), ("bart", 2))),
)
def test_generated_tokens_are_those_of_transformers_with_groups_in_flight(folders, name, num_stages):
    groups = [replace(make_rows(seed, num), label_mask=make_rows(seed, num).label_mask * 0) for seed, num in GROUPS]
    spec = spec_of(folders[name])
    whole = AutoModelForSeq2SeqLM.from_pretrained(folders[name]).eval()
    expected = []
    for rows in groups:
        inputs = two_texts(rows, whole.config)
        inputs.pop("labels")
        tokens = whole.generate(**inputs, max_new_tokens=5, do_sample=False, num_beams=1, eos_token_id=STOP)
        expected.append([until_stop(row) for row in tokens[:, 1:].tolist()])

    with pipeline_of(spec, stages_of(num_stages)) as pipeline:
        answers = pipeline.generate(0, groups, GenerateOptions(max_new_tokens=5, stop_tokens=(STOP,)))

    assert answers == expected


GROUPS = [(3, 2), (4, 3), (6, 1)]
STOP = 7


def until_stop(tokens):
    """An answer as the pipeline gives it: nothing from the stop token on, and no padding behind it."""
    return tokens[: tokens.index(STOP)] if STOP in tokens else tokens


@pytest.mark.parametrize("name", sampled(list(ENCODER_DECODERS), 1, always=("t5",)))
def test_trained_in_three_stages_equals_one_and_loads_with_stock_peft(folders, name, tmp_path):
    spec, results, batches = spec_of(folders[name], dropout=0.1), {}, make_batches(num_steps=3)
    for num_stages in (1, 2, 3):
        with pipeline_of(spec, stages_of(num_stages)) as pipeline:
            results[num_stages] = train_steps(pipeline, batches), pipeline.state(), pipeline.executors
            held_out = pipeline.evaluate(0, batches[0].rows)
    assert results[1][0] == results[2][0] == results[3][0]
    assert_same_tensors(results[1][1], results[3][1])
    assert_same_tensors(results[1][1], results[2][1])

    method = next(iter(results[1][2].values())).method
    (tmp_path / "adapter_config.json").write_text(json.dumps(method.peft_config()))
    save_file(results[1][1], tmp_path / "adapter_model.safetensors")
    base = AutoModelForSeq2SeqLM.from_pretrained(folders[name])
    loaded = peft.PeftModel.from_pretrained(base, str(tmp_path)).eval()
    assert method.peft_config()["task_type"] == "SEQ_2_SEQ_LM"
    with torch.no_grad():
        total = 0.0
        for rows in batches[0].rows:
            inputs = two_texts(rows, base.config)
            logits = loaded(**inputs).logits
            total += float(cross_entropy(logits.flatten(0, 1), inputs["labels"].flatten(), reduction="sum"))
    assert total == pytest.approx(held_out, rel=1e-5)


def under_t5s_old_names(tensors):
    """As the first checkpoints are: copies of the shared table, and a table that nobody reads."""
    copies = {f"{half}.embed_tokens.weight": tensors["shared.weight"].clone() for half in ("encoder", "decoder")}
    unread = {"decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight": torch.zeros(8, 4)}
    return {key: value for key, value in tensors.items() if key != "lm_head.weight"} | copies | unread


def of_the_base_model(tensors):
    return {key.removeprefix("model."): value for key, value in tensors.items() if key != "final_logits_bias"}


def with_copies(tensors):
    copies = {f"model.{half}.embed_tokens.weight": tensors["model.shared.weight"].clone() for half in HALVES}
    return tensors | copies | {"lm_head.weight": tensors["model.shared.weight"].clone()}


HALVES = ("encoder", "decoder")
LAYOUTS = [("t5", under_t5s_old_names), ("bart", of_the_base_model), ("bart", with_copies)]


@pytest.mark.parametrize(("name", "change"), sampled(LAYOUTS, 2, always=LAYOUTS[:2]))
def test_published_layouts_give_the_same_loss_and_sizes(folders, tmp_path, name, change):
    (tmp_path / "config.json").write_bytes((folders[name] / "config.json").read_bytes())
    save_file(change(load_file(folders[name] / "model.safetensors")), tmp_path / "model.safetensors")
    rows, found = make_rows(4, 3), []
    for folder in (folders[name], tmp_path):
        with pipeline_of(spec_of(folder), stages_of(3)) as pipeline:
            found.append(pipeline.evaluate(0, [rows]))

    assert found[0] == found[1]
    table, saved = describe_folder(tmp_path), describe_folder(folders[name])
    assert table.model_copy(update={"largest_tensor_params": 0}) == saved.model_copy(
        update={"largest_tensor_params": 0}
    )
    assert sum(table.block_params) + table.embedding_params + table.final_params == sum(
        p.numel() for p in make_model(name).parameters()
    )


def test_a_bias_of_the_logits_that_a_checkpoint_holds_is_added(folders, tmp_path):
    (tmp_path / "config.json").write_bytes((folders["bart"] / "config.json").read_bytes())
    bias = torch.linspace(-1, 1, 61)[None]
    tensors = load_file(folders["bart"] / "model.safetensors") | {"final_logits_bias": bias}
    save_file(tensors, tmp_path / "model.safetensors")
    rows = make_rows(4, 3)
    inputs = two_texts(rows, AutoModelForSeq2SeqLM.from_pretrained(tmp_path).config)
    with torch.no_grad():
        logits = AutoModelForSeq2SeqLM.from_pretrained(tmp_path).eval()(**inputs).logits

    with pipeline_of(spec_of(tmp_path), stages_of(2)) as pipeline:
        loss_sum = pipeline.evaluate(0, [rows])

    expected = cross_entropy(logits.flatten(0, 1), inputs["labels"].flatten(), reduction="sum")
    assert loss_sum == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("name", sampled(list(ENCODER_DECODERS), 2, always=("t5", "bart")))
def test_predicted_weight_bytes_are_those_of_each_stage(folders, name):
    table = describe_folder(folders[name])
    shape = JobShape(
        dtype="fp32",
        batch_rows=2,
        micro_batch_rows=2,
        row_tokens=9,
        label_tokens=4,
        **adapter_params_of(table, LoraConfig(rank=2)).shape_fields,
    )
    source = LocalSource(folders[name])
    for num_stages in (1, 2, 3, 4):
        for index, (start, end) in enumerate(pairwise((CUTS | {4: (0, 1, 2, 3, 4)})[num_stages])):
            place = {"num_stages": num_stages, "stage_index": index, "checkpointing": False}
            bill = stage_memory(table, shape, start_block=start, end_block=end, **place)
            weights = next(item.bytes for item in bill if item.name == "weights")
            stage = build_stage(source, start, end, dtype=torch.float32)
            assert weights == sum(parameter.nbytes for parameter in stage.model.parameters())


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_what_encoder_decoders_cannot_do_is_refused_with_the_way_out(folders, name):
    with (
        pytest.raises(ConfigError, match=r"writes another.*set objective.type: seq2seq"),
        pipeline_of(spec_of(folders[name], SftConfig()), stages_of(1)),
    ):
        pass
    prefix = spec_of(folders[name]).model_copy(update={"method": PrefixConfig()})
    with (
        pytest.raises(ConfigError, match=rf"prefix is not done for {name}.*use lora"),
        pipeline_of(prefix, stages_of(1)),
    ):
        pass
