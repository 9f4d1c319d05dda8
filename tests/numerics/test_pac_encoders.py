"""Parallel adapters beside encoders that score sequences: step 0, partitions, what others load, cached epochs."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import count

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForSequenceClassification

from edge_node.activation_cache.stage_cache import StageCache, row_keys
from edge_node.activation_cache.store import ActivationStore
from partitioner.adapter import adapter_params_of
from plutino.job.method import ParallelAdaptersConfig
from plutino.job.objective import ClassificationConfig, RegressionConfig
from plutino.load_adapter import load_adapter
from tests.numerics.objective_cases import CLASSES, batches_for, rows_for
from tests.numerics.pipelines import assert_same_tensors, make_spec, padded, pipeline_of, stages_of, train
from tests.numerics.tiny_families import ENCODERS, describe_folder, save_model
from tests.sampling import sampled

SERIALS = count()
SIDE = ParallelAdaptersConfig(reduction=2)
OBJECTIVES = {"classification": ClassificationConfig(labels=CLASSES), "regression": RegressionConfig()}


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    names = (*ENCODERS, "llama")
    return {name: save_model(name, tmp_path_factory.mktemp(name)) for name in names}


def spec_of(folder, objective):
    return make_spec(folder).model_copy(update={"objective": OBJECTIVES[objective], "method": SIDE})


def scores_of(pipeline, rows, *, with_side=True):
    stages = [executor.stage for executor in pipeline.executors.values()]
    sides = [stage.side for stage in stages]
    for stage, side in zip(stages, sides, strict=True):
        stage.side = side if with_side else None
    scores = pipeline.evaluate_rows(next(SERIALS), [rows])[1][0]
    for stage, side in zip(stages, sides, strict=True):
        stage.side = side
    return scores


CASES = [(name, objective) for name in (*ENCODERS, "llama") for objective in OBJECTIVES]


@pytest.mark.parametrize(
    ("name", "objective"),
    sampled(CASES, 3, always=(("bert", "classification"), ("roberta", "regression"), ("llama", "classification"))),
)
def test_starts_as_the_base_splits_exactly_and_is_loaded_by_plain_transformers(folders, name, objective, tmp_path):
    rows, results = rows_for(OBJECTIVES[objective], 77), {}
    for num_stages in (1, 3):
        with pipeline_of(spec_of(folders[name], objective), stages_of(num_stages)) as pipeline:
            executors = pipeline.executors.values()
            assert torch.equal(scores_of(pipeline, rows), scores_of(pipeline, rows, with_side=False))
            start = pipeline.state()
            decisions = train(pipeline, batches_for(OBJECTIVES[objective]))
            results[num_stages] = decisions, pipeline.state(), scores_of(pipeline, rows)
            assert not torch.equal(results[num_stages][2], scores_of(pipeline, rows, with_side=False))
            assert not [n for e in executors for n, p in e.stage.model.named_parameters() if p.grad is not None]
            config = next(iter(executors)).method.peft_config()
    assert results[1][0] == results[3][0]
    assert_same_tensors(results[1][1], results[3][1])
    assert torch.equal(results[1][2], results[3][2])
    state = results[1][1]
    assert not [key for key, value in state.items() if torch.equal(value, start[key])]

    save_file(state, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    model = AutoModelForSequenceClassification.from_pretrained(
        folders[name], num_labels=results[1][2].shape[1], ignore_mismatched_sizes=True
    ).eval()
    load_adapter(model, tmp_path)
    ids, _, mask = padded(rows)
    ids = ids.masked_fill(mask == 0, model.config.pad_token_id)
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=mask).logits
    torch.testing.assert_close(results[1][2], logits, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("num_stages", [1, 3])
def test_cached_epochs_have_the_bits_of_uncached_ones(folders, tmp_path, num_stages):
    spec, batches = spec_of(folders["bert"], "classification"), batches_for(OBJECTIVES["classification"], num_steps=2)
    store, caches, results = ActivationStore(tmp_path, 1 << 26), [], []

    def cache_of(stage):
        caches.append(StageCache(store, "tiny", stage, "raw"))
        return caches[-1]

    for options in ({}, {"activation_cache": cache_of}):
        with pipeline_of(spec, stages_of(num_stages), **options) as pipeline:
            decisions = [train(pipeline, batches, first_step=epoch * 2) for epoch in range(3)]
            results.append((decisions, pipeline.state()))
    for cache in caches:
        cache.close()
        assert cache.counts.rows_read and not cache.counts.rows_left_out

    assert results[0][0] == results[1][0]
    assert_same_tensors(results[0][1], results[1][1])


def test_rows_that_differ_in_where_the_second_text_starts_have_names_of_their_own():
    rows = rows_for(OBJECTIVES["classification"], 3)
    starts = [replace(rows, second_starts=np.full(4, at, np.int32)) for at in (2, 3)]
    names = [row_keys(each, "int4") for each in (rows, *starts)]

    assert not any(torch.equal(one, other) for i, one in enumerate(names) for other in names[:i])


@pytest.mark.parametrize("name", ENCODERS)
def test_planner_counts_the_side_network_of_an_encoder(folders, name):
    table = adapter_params_of(describe_folder(folders[name]), SIDE)
    with pipeline_of(spec_of(folders[name], "regression"), stages_of(1)) as pipeline:
        (executor,) = pipeline.executors.values()
        counted = sum(p.uses[0][1].numel() for p in executor.method.parameters if p.name.startswith("side."))

    assert table.num_params == counted
