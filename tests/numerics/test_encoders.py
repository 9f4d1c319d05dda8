"""Encoders that score sequences, split over stages, against transformers and stock peft."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import reduce
from itertools import pairwise
from operator import or_
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import cross_entropy
from transformers import AutoModelForSequenceClassification

from edge_node.methods.score_head import attach_method
from edge_node.objectives.sequence_scores import sequence_scores
from edge_node.profile import measure
from edge_node.stage.build import build_stage
from edge_node.stage.passes import StageInput
from edge_node.stage.weights import LocalSource
from partitioner.adapter import adapter_params_of
from partitioner.device import ProfileRequest
from partitioner.memory import stage_memory
from partitioner.shape import JobShape
from plutino.errors import ConfigError
from plutino.job.method import AdaptersConfig, LoraConfig, PrefixConfig
from plutino.job.objective import ClassificationConfig, RegressionConfig, SftConfig
from tests.numerics.chain import CUTS
from tests.numerics.objective_cases import CLASSES, batches_for, rows_for
from tests.numerics.pipelines import (
    assert_same_tensors,
    make_spec,
    padded,
    pipeline_of,
    stages_of,
    train,
)
from tests.numerics.tiny_families import ENCODERS, describe_folder, make_model, save_model
from tests.sampling import sampled

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

CLASSIFY = ClassificationConfig(labels=CLASSES)


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    return {name: save_model(name, tmp_path_factory.mktemp(name)) for name in ENCODERS}


def spec_of(folder, objective=CLASSIFY, **method):
    spec = make_spec(folder, **({"rank": 2, "target_modules": "all-linear"} | method))
    return spec.model_copy(update={"objective": objective})


def adapted_chain(folder, num_stages, spec):
    source = LocalSource(folder)
    stages = [build_stage(source, start, end, dtype=torch.float32) for start, end in pairwise(CUTS[num_stages])]
    return stages, [attach_method(stage, spec) for stage in stages]


def stock_model(folder, peft_config):
    base = AutoModelForSequenceClassification.from_pretrained(
        folder, num_labels=len(CLASSES), ignore_mismatched_sizes=True
    )
    return peft.get_peft_model(base, peft.LoraConfig(**peft_config)).eval()


def pad_of(stage):
    return stage.config.pad_token_id


def filled(states):
    """The methods' own state with every value away from where training starts."""
    generator = torch.Generator().manual_seed(11)
    joined = sorted(reduce(or_, states).items())
    return {name: value + 0.05 * torch.randn(value.shape, generator=generator) for name, value in joined}


SPLITS = [(name, num_stages, is_padded) for name in ENCODERS for num_stages in (1, 2, 3) for is_padded in (False, True)]


@pytest.mark.parametrize(
    ("name", "num_stages", "is_padded"),
    sampled(SPLITS, 3, always=(("bert", 3, True), ("roberta", 2, True), ("bert", 2, False))),
)
def test_split_gives_the_whole_models_scores_and_gradients_bit_for_bit(folders, name, num_stages, is_padded):
    stages, methods = adapted_chain(folders[name], num_stages, spec_of(folders[name]))
    values = filled([method.state() for method in methods])
    for method in methods:
        method.load(values)
    config = {key: value for key, value in methods[0].peft_config().items() if key in PEFT_KEYS}
    stock = stock_model(folders[name], config)
    peft.set_peft_model_state_dict(stock, values)
    # Without the model's own padding among them: it would be none.
    rows = replace(rows_for(CLASSIFY, 4))
    if not is_padded:
        rows = replace(rows, lengths=np.full(4, 6, np.int32), input_ids=rows.input_ids[:24], padded_tokens=6)
    ids, _, mask = padded(rows)
    ids = ids.masked_fill(mask == 0, pad_of(stages[0]))
    labels = torch.from_numpy(rows.labels).long()

    hidden, sent = None, []
    positions = ((mask.cumsum(1) - 1) * mask).long()
    for stage in stages:
        received = None if hidden is None else hidden.detach().requires_grad_(True)
        if hidden is not None:
            sent.append((hidden, received))
        hidden = stage.forward(
            StageInput(
                position_ids=positions,
                input_ids=ids if stage.is_first else None,
                hidden=received,
                attention_mask=mask if is_padded else None,
            )
        )
    scores = sequence_scores(stages[-1], hidden, rows)
    cross_entropy(scores, labels, reduction="sum").backward()
    for output, received in reversed(sent):
        output.backward(received.grad)
    # Positions are the model's own.
    expected = stock(input_ids=ids, attention_mask=mask if is_padded else None).logits
    cross_entropy(expected, labels, reduction="sum").backward()

    assert torch.equal(scores, expected)
    gradients = {p.name: p.uses[0][1].grad for method in methods for p in method.parameters}
    whole = {
        parameter_name.replace(".default", "").replace("modules_to_save.", ""): parameter.grad
        for parameter_name, parameter in stock.named_parameters()
        if parameter.requires_grad
    }
    assert_same_tensors(gradients, whole)
    assert all(gradient.abs().max() > 0 for gradient in gradients.values())


PEFT_KEYS = ("task_type", "r", "lora_alpha", "target_modules", "modules_to_save")


OBJECTIVES = {"classification": CLASSIFY, "regression": RegressionConfig()}
TRAINED = [(name, objective) for name in ENCODERS for objective in OBJECTIVES]


@pytest.mark.parametrize(
    ("name", "objective"), sampled(TRAINED, 2, always=(("bert", "regression"), ("roberta", "classification")))
)
def test_trained_in_three_stages_equals_one_and_loads_with_stock_peft(folders, name, objective, tmp_path):
    objective = OBJECTIVES[objective]
    spec, results = spec_of(folders[name], objective, dropout=0.1), {}
    rows = rows_for(objective, 77)
    for num_stages in (1, 3):
        with pipeline_of(spec, stages_of(num_stages)) as pipeline:
            decisions = train(pipeline, batches_for(objective))
            held_out = pipeline.evaluate_rows(0, [rows])
            results[num_stages] = decisions, pipeline.state(), held_out, pipeline.executors
    (one, state, (loss, values), executors), (three, other, (split_loss, split_values), _) = results[1], results[3]

    assert one == three and loss == split_loss
    assert_same_tensors(state, other)
    assert torch.equal(values[0], split_values[0])

    method = next(iter(executors.values())).method
    (tmp_path / "adapter_config.json").write_text(json.dumps(method.peft_config()))
    save_file(state, tmp_path / "adapter_model.safetensors")
    base = AutoModelForSequenceClassification.from_pretrained(
        folders[name], num_labels=values[0].shape[1], ignore_mismatched_sizes=True
    )
    loaded = peft.PeftModel.from_pretrained(base, str(tmp_path)).eval()
    assert loaded.base_model.targeted_module_names and not any(
        "pooler" in n for n in loaded.base_model.targeted_module_names
    )
    ids, _, mask = padded(rows)
    ids = ids.masked_fill(mask == 0, base.config.pad_token_id)
    with torch.no_grad():
        np.testing.assert_allclose(
            values[0].numpy(), loaded(input_ids=ids, attention_mask=mask).logits.numpy(), rtol=1e-5, atol=1e-6
        )


@pytest.mark.parametrize("name", sampled(list(ENCODERS), 1))
def test_adapters_behind_the_sublayers_are_partition_invariant(folders, name):
    spec = spec_of(folders[name]).model_copy(update={"method": AdaptersConfig(bottleneck=4)})
    states = []
    for num_stages in (1, 2):
        with pipeline_of(spec, stages_of(num_stages)) as pipeline:
            states.append((train(pipeline, batches_for(CLASSIFY)), pipeline.state()))

    assert states[0][0] == states[1][0]
    assert_same_tensors(states[0][1], states[1][1])


@pytest.mark.parametrize("name", ENCODERS)
def test_a_target_that_is_also_outside_of_the_blocks_means_the_blocks(folders, name):
    spec = spec_of(folders[name], target_modules=("dense",))
    _, (method,) = adapted_chain(folders[name], 1, spec)

    assert method.peft_config()["target_modules"] == ["intermediate.dense", "output.dense"]
    assert len([p for p in method.parameters if "lora_A" in p.name]) == 3 * 4


def layout_without_prefix(tensors, name):
    return {key.removeprefix(f"{name}."): value for key, value in tensors.items() if not key.startswith("classifier")}


def layout_of_tensorflow(tensors, name):
    """As the first checkpoints are: norms called after their symbols, heads of pre-training beside the model."""
    renamed = {
        key.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): value
        for key, value in tensors.items()
        if not key.startswith("classifier")
    }
    return renamed | {"cls.predictions.bias": torch.zeros(61), "cls.seq_relationship.weight": torch.zeros(2, 32)}


LAYOUTS = [("bert", layout_without_prefix), ("bert", layout_of_tensorflow), ("roberta", layout_without_prefix)]


@pytest.mark.parametrize(("name", "change"), sampled(LAYOUTS, 2, always=LAYOUTS[1:]))
@torch.no_grad()
def test_published_layouts_give_the_same_scores_and_sizes(folders, tmp_path, name, change):
    (tmp_path / "config.json").write_bytes((folders[name] / "config.json").read_bytes())
    save_file(change(load_file(folders[name] / "model.safetensors"), name), tmp_path / "model.safetensors")
    rows, scores = rows_for(CLASSIFY, 4), []
    for folder in (folders[name], tmp_path):
        with pipeline_of(spec_of(folder), stages_of(2)) as pipeline:
            scores.append(pipeline.evaluate_rows(0, [rows])[1][0])

    assert torch.equal(*scores)
    table = describe_folder(tmp_path)
    base = make_model(name).base_model
    assert sum(table.block_params) + table.embedding_params + table.final_params == sum(
        p.numel() for p in base.parameters()
    )


@pytest.mark.parametrize("name", ENCODERS)
def test_predicted_weight_bytes_are_those_of_each_stage(folders, name):
    table = describe_folder(folders[name])
    shape = JobShape(
        dtype="fp32",
        batch_rows=2,
        micro_batch_rows=2,
        row_tokens=9,
        label_tokens=1,
        **adapter_params_of(table, LoraConfig(rank=2)).shape_fields,
    )
    source = LocalSource(folders[name])
    for num_stages in (1, 3):
        for index, (start, end) in enumerate(pairwise(CUTS[num_stages])):
            place = {"num_stages": num_stages, "stage_index": index, "checkpointing": False}
            bill = stage_memory(table, shape, start_block=start, end_block=end, **place)
            weights = next(item.bytes for item in bill if item.name == "weights")
            stage = build_stage(source, start, end, dtype=torch.float32)
            assert weights == sum(parameter.nbytes for parameter in stage.model.parameters())


@pytest.mark.parametrize("name", ENCODERS)
def test_positions_leave_room_for_those_of_padding(folders, name):
    assert describe_folder(folders[name]).max_positions == {"bert": 64, "roberta": 62}[name]


@pytest.mark.slow
def test_device_measures_a_block_of_an_encoder(folders):
    request = ProfileRequest(
        config_json=(Path(folders["roberta"]) / "config.json").read_text(),
        dtype="fp32",
        micro_batch_rows=1,
        row_tokens=4,
        label_tokens=1,
        method=LoraConfig(rank=2),
        threads=1,
    )

    timings = measure(request)

    assert timings.forward_s > 0 and timings.head_forward_s > 0


@pytest.mark.parametrize("name", ENCODERS)
def test_what_encoders_cannot_do_is_refused_with_the_way_out(folders, name):
    source = LocalSource(folders[name])

    with pytest.raises(ConfigError, match=r"predicts no next token.*use classification or regression"):
        attach_method(build_stage(source, 0, 4, dtype=torch.float32), spec_of(folders[name], SftConfig()))
    prefix = spec_of(folders[name]).model_copy(update={"method": PrefixConfig()})
    with pytest.raises(ConfigError, match=rf"prefix is not done for {name}.*use lora or adapters"):
        attach_method(build_stage(source, 0, 4, dtype=torch.float32), prefix)
    with pytest.raises(ConfigError, match=rf"prefix is not done for {name}"):
        adapter_params_of(describe_folder(folders[name]), PrefixConfig())
