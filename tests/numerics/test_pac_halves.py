"""Parallel adapters beside encoder-decoders: step 0, cuts in either half, what crosses borders, what others load."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file
from torch.nn.functional import cross_entropy
from transformers import AutoModelForSeq2SeqLM

from edge_node.activation_cache.stage_cache import StageCache, row_keys
from edge_node.activation_cache.store import ActivationStore
from edge_node.engine.generate import GenerateOptions
from edge_node.stage.verify import part_difference
from edge_node.transport.base import MessageKind, Peer
from partitioner.adapter import adapter_params_of
from plutino.errors import ConfigError
from plutino.job.assignment import StageShape
from plutino.job.method import ParallelAdaptersConfig
from plutino.job.objective import Seq2SeqConfig
from plutino.load_adapter import load_adapter
from tests.numerics.pipelines import (
    assert_same_tensors,
    make_batches,
    make_rows,
    make_spec,
    pipeline_of,
    stages_of,
    train,
)
from tests.numerics.test_encoder_decoders import two_texts
from tests.numerics.tiny_families import ENCODER_DECODERS, describe_folder, save_model
from tests.sampling import sampled

SIDE = ParallelAdaptersConfig(reduction=2)
UPPER = ParallelAdaptersConfig(reduction=4, blocks=(1, 3), init="random")
GREEDY = GenerateOptions(max_new_tokens=5, stop_tokens=())
WIDTH, SIDE_WIDTH = 32, 16


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    return {name: save_model(name, tmp_path_factory.mktemp(name)) for name in ENCODER_DECODERS}


def spec_of(folder, method=SIDE):
    return make_spec(folder).model_copy(update={"objective": Seq2SeqConfig(), "method": method})


def trained(spec, num_stages):
    """Decisions, start, adapter, greedy tokens and config of a job; its backbone took no gradient."""
    rows, sources = make_batches()[0].rows, [replace(make_rows(5, 3), label_mask=make_rows(5, 3).label_mask * 0)]
    with pipeline_of(spec, stages_of(num_stages)) as pipeline:
        assert pipeline.evaluate(0, rows) == pipeline.evaluate(1, rows, without_adapter=True)
        start, decisions = pipeline.state(), train(pipeline, make_batches())
        assert pipeline.evaluate(2, rows) != pipeline.evaluate(3, rows, without_adapter=True)
        executors = pipeline.executors.values()
        assert not [n for e in executors for n, p in e.stage.model.named_parameters() if p.grad is not None]
        assert all(part_difference(e.stage, e.method, pipeline.state()) == 0 for e in executors)
        tokens = pipeline.generate(4, sources, GREEDY)
        loss = pipeline.evaluate(5, rows)
        return decisions, start, pipeline.state(), tokens, loss, next(iter(executors)).method.peft_config()


CASES = [(name, method) for name in ENCODER_DECODERS for method in (SIDE, UPPER)]


@pytest.mark.parametrize(
    ("name", "method"), sampled(CASES, 3, always=(("t5_gated", SIDE), ("bart", SIDE), ("t5", UPPER)))
)
def test_cuts_in_either_half_change_no_bit_and_plain_transformers_gives_the_same(folders, name, method, tmp_path):
    spec = spec_of(folders[name], method)
    decisions, start, state, tokens, loss, config = trained(spec, 1)
    for num_stages in (2, 3):
        split = trained(spec, num_stages)
        assert split[0] == decisions
        assert_same_tensors(split[1], start)
        assert_same_tensors(split[2], state)
        assert split[3] == tokens
    assert not [key for key, value in state.items() if torch.equal(value, start[key])]

    save_file(state, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    model = AutoModelForSeq2SeqLM.from_pretrained(folders[name]).eval()
    base = AutoModelForSeq2SeqLM.from_pretrained(folders[name]).eval()
    loaded = load_adapter(model, tmp_path)
    total = 0.0
    for rows in make_batches()[0].rows:
        inputs = two_texts(rows, model.config)
        with torch.no_grad():
            logits = model(**inputs).logits
            with loaded.disable_adapter():
                assert torch.equal(model(**inputs).logits, base(**inputs).logits)
        total += float(cross_entropy(logits.flatten(0, 1), inputs["labels"].flatten(), reduction="sum"))
    assert total == pytest.approx(loss, rel=1e-5)
    rows = replace(make_rows(5, 3), label_mask=make_rows(5, 3).label_mask * 0)
    inputs = two_texts(rows, model.config)
    inputs.pop("labels")
    found = model.generate(**inputs, max_new_tokens=5, min_new_tokens=5, do_sample=False, num_beams=1)
    assert [row[1:] for row in found.tolist()] == tokens[0]
    beams = model.generate(**inputs, max_new_tokens=4, num_beams=2, do_sample=False)
    uncached = model.generate(**inputs, max_new_tokens=4, num_beams=2, do_sample=False, use_cache=False)
    assert torch.equal(beams, uncached)


def test_only_narrow_side_gradients_go_back(folders):
    sent: dict[Peer, list] = {}
    batch = make_batches(num_steps=1)[0]
    with pipeline_of(spec_of(folders["t5"]), stages_of(4)) as pipeline:
        for me, executor in pipeline.executors.items():
            _record(executor.transport, sent.setdefault(me, []))
        train(pipeline, [batch])

    def of(me, kind):
        return [names for found, names in sent[Peer(me)] if found == kind]

    # The first cut is inside the encoder, where no target's side state is, the third inside the decoder.
    assert all(
        names == {"source": WIDTH, "hidden": WIDTH, "source side": SIDE_WIDTH} for names in of(0, MessageKind.FORWARD)
    )
    assert all(
        names == {"source": WIDTH, "hidden": WIDTH, "source side": SIDE_WIDTH, "side": SIDE_WIDTH}
        for names in of(2, MessageKind.FORWARD)
    )
    assert all(names == {"source side gradient": SIDE_WIDTH} for names in of(1, MessageKind.BACKWARD))
    assert all(
        names == {"source side gradient": SIDE_WIDTH, "gradient": SIDE_WIDTH} for names in of(3, MessageKind.BACKWARD)
    )
    assert {kind for entries in sent.values() for kind, _ in entries} == {MessageKind.FORWARD, MessageKind.BACKWARD}


def _record(transport, entries):
    send = transport.send

    def recording(peer, key, tensors, **options):
        entries.append((key.kind, {name: t.shape[-1] for name, t in tensors.items() if t.is_floating_point()}))
        return send(peer, key, tensors, **options)

    transport.send = recording


def cached_epochs(spec, root, shapes, *, num_epochs, first_epoch=0, state=None, **options):
    """Decisions of epochs on one cache, adapter, and how often blocks ran."""
    store, caches, runs = ActivationStore(root, 1 << 26), [], []

    def cache_of(stage):
        caches.append(StageCache(store, "tiny", stage, "raw"))
        return caches[-1]

    batches = make_batches(num_steps=2)
    with pipeline_of(spec, shapes, activation_cache=cache_of, **options) as pipeline:
        if state is not None:
            pipeline.restore(state)
        for executor in pipeline.executors.values():
            _count_runs(executor.stage, runs)
        decisions = [
            train(pipeline, batches, first_step=epoch * len(batches))
            for epoch in range(first_epoch, first_epoch + num_epochs)
        ]
        snapshot, adapter = pipeline.snapshot(), pipeline.state()
    for cache in caches:
        cache.close()
        assert not cache.counts.rows_left_out
    return decisions, adapter, len(runs), snapshot


def _count_runs(stage, runs):
    run = stage._halves_alone
    stage._halves_alone = lambda inputs: runs.append(0) or run(inputs)


@pytest.mark.parametrize(("name", "method"), [("t5", SIDE), ("bart", UPPER)])
def test_cached_epochs_with_and_without_the_backbone_have_the_bits_of_uncached_ones(folders, tmp_path, name, method):
    spec, batches = spec_of(folders[name], method), make_batches(num_steps=2)
    with pipeline_of(spec, stages_of(1)) as pipeline:
        expected = [train(pipeline, batches, first_step=epoch * 2) for epoch in range(3)]
        expected_adapter = pipeline.state()

    decisions, adapter, num_runs, _ = cached_epochs(spec, tmp_path / "a", stages_of(3), num_epochs=3)
    assert decisions == expected
    assert_same_tensors(adapter, expected_adapter)
    assert num_runs == 3 * sum(len(batch.rows) for batch in batches)

    first, _, _, snapshot = cached_epochs(spec, tmp_path / "b", stages_of(2), num_epochs=1)
    replicated = StageShape(start_block=0, end_block=4, num_replicas=2, micro_batch_owner=(0, 1))
    later, adapter, num_runs, _ = cached_epochs(
        spec, tmp_path / "b", [replicated], num_epochs=2, first_epoch=1, state=snapshot, from_cache=True
    )
    assert [*first, *later] == expected
    assert_same_tensors(adapter, expected_adapter)
    assert num_runs == 0


def test_rows_with_another_border_between_source_and_target_have_names_of_their_own():
    rows = make_rows(3)
    moved = rows.label_mask.copy()
    moved[rows.label_mask.argmax()] = 0
    names = [row_keys(each, "int4", has_targets=True) for each in (rows, replace(rows, label_mask=moved))]

    assert not torch.equal(*names)
    assert torch.equal(row_keys(rows, "int4"), row_keys(replace(rows, label_mask=moved), "int4"))


@pytest.mark.parametrize("name", ENCODER_DECODERS)
def test_planner_counts_the_side_network_of_every_block(folders, name):
    table = adapter_params_of(describe_folder(folders[name]), SIDE)
    with pipeline_of(spec_of(folders[name]), stages_of(4)) as pipeline:
        found = [
            sum(p.uses[0][1].numel() for p in executor.method.parameters) for executor in pipeline.executors.values()
        ]
    expected = [block.params for block in table.blocks]
    expected[-1] += table.last_params

    assert found == expected


def test_blocks_of_one_half_alone_are_refused_with_the_way_out(folders):
    method = ParallelAdaptersConfig(reduction=2, blocks=(2, 3))
    with (
        pytest.raises(ConfigError, match=r"name some of 0 to 1 and some of 2 to 3"),
        pipeline_of(spec_of(folders["t5"], method), stages_of(1)),
    ):
        pass
    with pytest.raises(ConfigError, match=r"name some of 0 to 1 and some of 2 to 3"):
        adapter_params_of(describe_folder(folders["t5"]), method)
