"""Generation through the pipeline: transformers' own tokens, in every partition."""

from __future__ import annotations

import gc
import itertools
import weakref
from functools import cache

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from edge_node.engine.generate import GenerateOptions, uniform
from edge_node.transport.base import Peer, UnitCancelledError
from plutino.errors import PeerLostError
from plutino.types import Unit, UnitKind
from tests.numerics.pipelines import (
    cancel_at_call,
    make_batches,
    make_rows,
    make_spec,
    pipeline_of,
    run_step,
    stages_of,
    train,
)

NEW_TOKENS = 5
GREEDY = GenerateOptions(max_new_tokens=NEW_TOKENS, stop_tokens=())


def make_groups(num_groups: int = 3, num_rows: int = 3):
    return [make_rows(100 + g, num_rows, num_tokens=6 + g) for g in range(num_groups)]


def sampling(groups, **changes) -> GenerateOptions:
    values = {"max_new_tokens": NEW_TOKENS, "stop_tokens": (), "temperature": 1.5, "step": 4}
    return GenerateOptions(**values | changes, sample_indices=tuple(rows.sample_indices for rows in groups))


@cache
def whole_model(model_dir, dtype=torch.float32):
    return AutoModelForCausalLM.from_pretrained(model_dir, dtype=dtype).eval()


def generate_with_transformers(model_dir, groups, stop_tokens=(), max_new_tokens=NEW_TOKENS):
    """New tokens per group and row by transformers' own generate on left-padded prompts."""
    found = []
    for rows in groups:
        width = rows.padded_tokens
        prompts = np.split(rows.input_ids, np.cumsum(rows.lengths)[:-1])
        ids = torch.tensor([[0] * (width - len(prompt)) + prompt.tolist() for prompt in prompts])
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        options = {"eos_token_id": list(stop_tokens)} if stop_tokens else {}
        output = whole_model(model_dir).generate(
            ids, attention_mask=mask, max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=0, **options
        )
        found.append([until_stop(row, stop_tokens) for row in output[:, width:].tolist()])
    return found


def until_stop(tokens, stop_tokens):
    return tokens[: next((i for i, token in enumerate(tokens) if token in stop_tokens), len(tokens))]


@pytest.mark.parametrize("num_stages", [1, 2, 3])
@pytest.mark.parametrize("model", ["llama", "gpt2"])
def test_greedy_tokens_are_those_of_transformers_generate(model_dirs, model, num_stages):
    groups = make_groups()
    expected = generate_with_transformers(model_dirs[model], groups)

    with pipeline_of(make_spec(model_dirs[model]), stages_of(num_stages)) as pipeline:
        assert pipeline.generate(0, groups, GREEDY) == expected
    assert all(len(row) == NEW_TOKENS for rows in expected for row in rows)


@pytest.mark.parametrize("num_stages", [1, 2, 4])
def test_rows_end_at_their_own_stop_tokens_as_in_transformers_generate(model_dirs, num_stages):
    groups = make_groups()
    unstopped = generate_with_transformers(model_dirs["llama"], groups)
    # The whole first group stops early, of the second one row stops at once, the others when they come to it.
    stops = tuple({*(row[2] for row in unstopped[0]), unstopped[1][0][0]})
    expected = generate_with_transformers(model_dirs["llama"], groups, stops)

    with pipeline_of(make_spec(model_dirs["llama"]), stages_of(num_stages)) as pipeline:
        options = GenerateOptions(max_new_tokens=NEW_TOKENS, stop_tokens=stops)
        assert pipeline.generate(0, groups, options) == expected
    lengths = {len(row) for rows in expected for row in rows}
    assert 0 in lengths and len(lengths) >= 3 and max(len(row) for row in expected[0]) < NEW_TOKENS


@pytest.mark.parametrize("num_stages", [2, 3])
def test_more_groups_than_messages_fit_between_stages_do_not_deadlock(model_dirs, num_stages):
    """All groups used to be prefilled first: the first stage waited for room ahead, the last for room behind."""
    groups = make_groups(num_groups=9, num_rows=1)

    with pipeline_of(make_spec(model_dirs["llama"]), stages_of(num_stages)) as pipeline:
        assert pipeline.generate(0, groups, GREEDY) == generate_with_transformers(model_dirs["llama"], groups)


@pytest.mark.parametrize("max_new_tokens", [1, 2])
def test_generation_stops_at_max_new_tokens(model_dirs, max_new_tokens):
    groups = make_groups()
    options = GenerateOptions(max_new_tokens=max_new_tokens, stop_tokens=())

    with pipeline_of(make_spec(model_dirs["llama"]), stages_of(2)) as pipeline:
        tokens = pipeline.generate(0, groups, options)

    assert tokens == [
        [row[:max_new_tokens] for row in rows] for rows in generate_with_transformers(model_dirs["llama"], groups)
    ]


def test_generation_without_the_adapter_is_the_base_model_and_leaves_the_adapter_on(model_dirs):
    groups, batches = make_groups(), make_batches()
    with pipeline_of(make_spec(model_dirs["llama"], training={"lr": 0.3}), stages_of(2)) as pipeline:
        train(pipeline, batches)
        loss = pipeline.evaluate(0, batches[0].rows)
        adapted = pipeline.generate(1, groups, GREEDY)
        base = pipeline.generate(2, groups, GenerateOptions(NEW_TOKENS, (), use_adapter=False))

        assert base == generate_with_transformers(model_dirs["llama"], groups) != adapted
        assert pipeline.generate(3, groups, GREEDY) == adapted
        assert pipeline.evaluate(1, batches[0].rows) == loss


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_sampled_tokens_do_not_depend_on_the_partition(model_dirs, dtype):
    groups = make_groups()
    results = []
    for stages in (stages_of(1), stages_of(2), stages_of(3), stages_of(2, (2, 2), ((0, 1), (0, 1)))):
        with pipeline_of(make_spec(model_dirs["llama"]), stages, dtype=dtype) as pipeline:
            results.append(pipeline.generate(0, groups, sampling(groups)))

    assert all(result == results[0] for result in results)


def test_sampled_tokens_depend_on_seed_step_and_sample_and_not_on_the_unit_or_the_grouping(model_dirs):
    groups = make_groups(num_groups=1)
    with pipeline_of(make_spec(model_dirs["llama"]), stages_of(1)) as pipeline:
        tokens = pipeline.generate(0, groups, sampling(groups))
        assert pipeline.generate(1, groups, sampling(groups)) == tokens
        assert pipeline.generate(2, groups, sampling(groups, step=5)) != tokens
        assert pipeline.generate(3, groups, sampling(groups, temperature=0.01)) == pipeline.generate(4, groups, GREEDY)
    with pipeline_of(make_spec(model_dirs["llama"], training={"seed": 4}), stages_of(1)) as pipeline:
        assert pipeline.generate(0, groups, sampling(groups)) != tokens


def test_sampling_follows_the_models_distribution(model_dirs):
    prompt = make_rows(100, num_rows=1)
    num_rows = 3000
    rows = type(prompt)(
        lengths=np.repeat(prompt.lengths, num_rows),
        input_ids=np.tile(prompt.input_ids, num_rows),
        label_mask=np.tile(prompt.label_mask, num_rows),
        padded_tokens=prompt.padded_tokens,
        sample_indices=tuple(range(num_rows)),
    )
    with pipeline_of(make_spec(model_dirs["llama"]), stages_of(1)) as pipeline:
        (tokens,) = pipeline.generate(0, [rows], sampling([rows], max_new_tokens=1, temperature=2.0))

    with torch.no_grad():
        logits = whole_model(model_dirs["llama"])(torch.from_numpy(prompt.input_ids)[None].long()).logits[0, -1]
    shares = torch.softmax(logits / 2.0, dim=-1)
    found = torch.bincount(torch.tensor(tokens)[:, 0], minlength=61) / num_rows
    # Four standard deviations of the likeliest token's share; fixed by the seed.
    assert (found - shares).abs().max() < 4 * 0.5 / num_rows**0.5
    assert not found[shares < 1e-7].any()


def test_top_p_leaves_out_the_unlikely_and_changes_nothing_at_one(model_dirs):
    groups = make_groups()
    with pipeline_of(make_spec(model_dirs["llama"]), stages_of(2)) as pipeline:
        all_tokens = pipeline.generate(0, groups, sampling(groups))
        likeliest = pipeline.generate(1, groups, sampling(groups, top_p=1e-9))
        some = pipeline.generate(2, groups, sampling(groups, top_p=0.5))
        assert pipeline.generate(3, groups, sampling(groups, top_p=1.0)) == all_tokens
    assert likeliest == generate_with_transformers(model_dirs["llama"], groups)
    assert some not in (all_tokens, likeliest)
    with pipeline_of(make_spec(model_dirs["llama"]), stages_of(3)) as pipeline:
        assert pipeline.generate(0, groups, sampling(groups, top_p=0.5)) == some


def test_stop_tokens_are_given_where_they_are_kept(model_dirs):
    groups = make_groups()
    stops = (generate_with_transformers(model_dirs["llama"], groups)[0][0][2],)
    with pipeline_of(make_spec(model_dirs["llama"]), stages_of(2)) as pipeline:
        without, kept = (
            pipeline.generate(serial, groups, GenerateOptions(NEW_TOKENS, stop_tokens=stops, keep_stop=serial == 1))
            for serial in range(2)
        )
    expected = [[row + [stops[0]] * (len(row) < NEW_TOKENS) for row in rows] for rows in without]
    assert kept == expected != without


def test_uniform_is_below_one_and_depends_on_every_part():
    draws = [uniform(0, 1, 2, position) for position in range(2000)]

    assert all(0 <= draw < 1 for draw in draws) and len(set(draws)) == len(draws)
    assert sum(draws) / len(draws) == pytest.approx(0.5, abs=0.03)
    assert len({uniform(1, 2, 3), uniform(2, 1, 3), uniform(12, 3), uniform(1, 23)}) == 4


def record_caches(pipeline):
    """Weak references to every KV cache that the stages make."""
    caches = []
    for executor in pipeline.executors.values():
        make = executor.stage.new_cache

        def new_cache(make=make):
            cache = make()
            caches.append(weakref.ref(cache))
            return cache

        executor.stage.new_cache = new_cache
    return caches


@pytest.mark.parametrize(("num_stages", "stage"), [(1, 0), (3, 0), (3, 1), (3, 2)])
def test_cancelled_generation_frees_its_caches_and_the_next_units_run(model_dirs, num_stages, stage):
    groups = make_groups()
    with pipeline_of(make_spec(model_dirs["llama"]), stages_of(num_stages)) as pipeline:
        caches = record_caches(pipeline)
        cancel_at_call(pipeline, Peer(stage), Unit(UnitKind.GENERATE, 0), call=5)
        with pytest.raises(UnitCancelledError):
            pipeline.generate(0, groups, GREEDY)
        gc.collect()
        assert caches and not any(cache() for cache in caches)

        assert pipeline.generate(1, groups, GREEDY) == generate_with_transformers(model_dirs["llama"], groups)
        run_step(pipeline, 0, make_batches()[0])


def test_generation_that_loses_a_stage_frees_its_caches_and_another_plan_gives_the_same_answers(model_dirs):
    groups, spec = make_groups(), make_spec(model_dirs["llama"])
    with pipeline_of(spec, stages_of(3)) as pipeline:
        caches = record_caches(pipeline)
        stage = pipeline.executors[Peer(1)].stage
        forward, calls = stage.forward, itertools.count(1)

        def losing(inputs):
            if next(calls) == 5:
                pipeline.executors[Peer(1)].transport.close()
            return forward(inputs)

        stage.forward = losing
        with pytest.raises(PeerLostError):
            pipeline.generate(0, groups, GREEDY)
        gc.collect()
        assert caches and not any(cache() for cache in caches)

    with pipeline_of(spec, stages_of(2)) as replanned:
        assert replanned.generate(0, groups, GREEDY) == generate_with_transformers(model_dirs["llama"], groups)


def test_finished_generation_keeps_no_cache(model_dirs):
    with pipeline_of(make_spec(model_dirs["llama"]), stages_of(2)) as pipeline:
        caches = record_caches(pipeline)
        pipeline.generate(0, make_groups(), GREEDY)
        gc.collect()

        assert len(caches) == 2 * 3 and not any(cache() for cache in caches)


def test_at_most_as_many_caches_live_on_a_stage_as_there_are_stages(model_dirs):
    with pipeline_of(make_spec(model_dirs["llama"]), stages_of(2)) as pipeline:
        stage = pipeline.executors[Peer(1)].stage
        caches, make, alive = [], stage.new_cache, []

        def new_cache():
            cache = make()
            caches.append(weakref.ref(cache))
            alive.append(sum(cache() is not None for cache in caches))
            return cache

        stage.new_cache = new_cache
        pipeline.generate(0, make_groups(num_groups=5), GREEDY)

    assert max(alive) == 2
