"""Epochs on the activation cache: bit-equal to those without, whatever is missing, damaged or has no room."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from edge_node.activation_cache.stage_cache import StageCache, row_keys, state_names
from edge_node.activation_cache.store import ActivationStore
from edge_node.transport.base import MessageKind, Peer
from plutino.job.method import ParallelAdaptersConfig
from plutino.job.objective import SftConfig
from plutino.job.objective_part import LENGTH_DISCOUNTS
from tests.numerics.pipelines import (
    assert_same_tensors,
    make_batches,
    make_spec,
    pipeline_of,
    stages_of,
    train,
)

SIDE = ParallelAdaptersConfig(reduction=2)
UPPER = ParallelAdaptersConfig(reduction=2, blocks=(2, 3))
BY_TOKEN = SftConfig()
EPOCHS = 3
MIB = 1 << 20


class Cached:
    """A pipeline whose stages share a device's cache, and what its blocks and its links did."""

    def __init__(self, pipeline, caches):
        self.pipeline = pipeline
        self.caches = caches
        self.num_blocks_runs = dict.fromkeys(pipeline.executors, 0)
        self.sent_floats = dict.fromkeys(pipeline.executors, 0)
        for me, executor in pipeline.executors.items():
            self._count(me, executor)

    def _count(self, me, executor):
        forward, send = executor.stage.forward, executor.transport.send

        def counting(inputs):
            self.num_blocks_runs[me] += 1
            return forward(inputs)

        def measuring(peer, key, tensors, **options):
            if key.kind == MessageKind.FORWARD:
                self.sent_floats[me] += sum(t.numel() for t in tensors.values() if t.is_floating_point())
            return send(peer, key, tensors, **options)

        executor.stage.forward, executor.transport.send = counting, measuring

    def counts(self):
        found = dict(self.num_blocks_runs)
        self.num_blocks_runs = dict.fromkeys(found, 0)
        return found


def epochs(
    spec, num_stages, root, *, budget_bytes=64 * MIB, codec="raw", between=lambda cached: None, num=EPOCHS, **options
):
    """Decisions per epoch, adapter, block runs per epoch, the stages' caches. The same micro-batches every epoch."""
    caches, stores = [], ActivationStore(root, budget_bytes)

    def cache_of(stage):
        caches.append(StageCache(stores if budget_bytes else None, "tiny", stage, codec))
        return caches[-1]

    batches, decisions, runs = batches_of(spec), [], []
    with pipeline_of(spec, stages_of(num_stages), activation_cache=cache_of) as pipeline:
        cached = Cached(pipeline, caches)
        for epoch in range(num):
            decisions.append(train(pipeline, batches, first_step=epoch * len(batches)))
            runs.append(cached.counts())
            between(cached)
        state = pipeline.state()
    for cache in caches:
        cache.close()
    return decisions, state, runs, caches


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return lambda: tmp_path_factory.mktemp("activations")


_UNCACHED = {}


def batches_of(spec):
    batches = make_batches(num_steps=2)
    discount = LENGTH_DISCOUNTS.get(spec.objective.counted, 0.0)
    return [replace(batch, rows=[replace(rows, length_discount=discount) for rows in batch.rows]) for batch in batches]


def uncached(model_dir, method=SIDE, objective=BY_TOKEN):
    """The same job on one stage without any cache."""
    key = model_dir, method, objective
    if key not in _UNCACHED:
        spec = make_spec(model_dir).model_copy(update={"method": method, "objective": objective})
        batches = batches_of(spec)
        with pipeline_of(spec, stages_of(1)) as pipeline:
            decisions = [train(pipeline, batches, first_step=epoch * 2) for epoch in range(EPOCHS)]
            _UNCACHED[key] = decisions, pipeline.state()
    return _UNCACHED[key]


def assert_as_uncached(found, model_dir, method=SIDE, objective=BY_TOKEN):
    decisions, state = uncached(model_dir, method, objective)
    assert found[0] == decisions
    assert_same_tensors(found[1], state)


@pytest.mark.parametrize(
    ("model", "num_stages", "mean_over"),
    [("llama", 1, "tokens"), ("llama", 3, "tokens"), ("gpt2", 1, "tokens"), ("gpt2", 3, "rows")],
)
def test_cached_epochs_have_the_bits_of_uncached_ones_and_run_no_block(model_dirs, root, model, num_stages, mean_over):
    objective = SftConfig(mean_over=mean_over)
    spec = make_spec(model_dirs[model]).model_copy(update={"method": SIDE, "objective": objective})

    found = epochs(spec, num_stages, root())

    assert_as_uncached(found, model_dirs[model], objective=objective)
    assert all(count > 0 for count in found[2][0].values())
    assert [set(runs.values()) for runs in found[2][1:]] == [{0}, {0}]


def test_stages_below_the_lowest_chosen_block_send_no_hidden_states_in_cached_epochs(model_dirs, root):
    spec = make_spec(model_dirs["llama"]).model_copy(update={"method": UPPER})
    floats = []

    def note(cached):
        floats.append(dict(cached.sent_floats))
        cached.sent_floats = dict.fromkeys(cached.sent_floats, 0)

    found = epochs(spec, 3, root(), between=note)

    assert_as_uncached(found, model_dirs["llama"], UPPER)
    assert [set(runs.values()) for runs in found[2][1:]] == [{0}, {0}]
    assert floats[0][Peer(0)] > 0
    assert floats[1] == {Peer(0): 0, Peer(1): floats[1][Peer(1)], Peer(2): 0}
    # Of hidden and side state, 32 and 16 numbers a token, the latter is left.
    assert floats[0][Peer(1)] == 3 * floats[1][Peer(1)]


def test_second_job_with_other_cuts_finds_what_the_first_one_left(model_dirs, root):
    spec = make_spec(model_dirs["llama"]).model_copy(update={"method": SIDE})
    folder = root()
    epochs(spec, 3, folder, num=1)

    found = epochs(spec, 2, folder)

    assert_as_uncached(found, model_dirs["llama"])
    assert set(found[2][0].values()) == {0}


def test_what_has_no_room_is_counted_and_computed_again_in_every_epoch(model_dirs, root):
    spec = make_spec(model_dirs["llama"]).model_copy(update={"method": SIDE})

    folder = root()
    found = epochs(spec, 2, folder, budget_bytes=16_000)

    assert_as_uncached(found, model_dirs["llama"])
    # A whole job's worth of states does not fit, some of it does.
    assert any(cache.counts.rows_left_out for cache in found[3])
    # Of a row that lacks a state the others would be of no use.
    kept = {path.stem: path.read_bytes() for path in folder.glob("tiny/*.index")}
    keys = {state: {index[at : at + 16] for at in range(0, len(index), 32)} for state, index in kept.items()}
    for cache in found[3]:
        assert len({frozenset(keys[name]) for name in cache.names}) == 1
    assert any(cache.counts.rows_written for cache in found[3])
    assert all(sum(runs.values()) > 0 for runs in found[2][1:])


def test_device_that_gives_no_room_at_all_costs_nothing_but_time(model_dirs, root):
    spec = make_spec(model_dirs["llama"]).model_copy(update={"method": SIDE})

    assert_as_uncached(epochs(spec, 2, root(), budget_bytes=0), model_dirs["llama"])


def test_damaged_entries_are_noticed_computed_again_and_written_anew(model_dirs, root):
    spec = make_spec(model_dirs["llama"]).model_copy(update={"method": SIDE})
    folder = root()
    damaged = []

    def damage(cached):
        if not damaged:
            path = folder / "tiny" / "h2.data"
            data = bytearray(path.read_bytes())
            data[40] ^= 1
            with path.open("r+b") as file:  # in place, so that whoever mapped it sees it
                file.write(data)
            damaged.append(path)

    found = epochs(spec, 3, folder, between=damage)

    assert_as_uncached(found, model_dirs["llama"])
    assert sum(cache.num_damaged for cache in found[3]) == 1
    assert sum(found[2][1].values()) > 0
    assert sum(found[2][2].values()) == 0


def test_replicas_share_what_they_cached(model_dirs, root):
    spec = make_spec(model_dirs["llama"]).model_copy(update={"method": SIDE})
    caches, store = [], ActivationStore(root(), 64 * MIB)
    batches = make_batches(num_steps=2)

    def cache_of(stage):
        # Each replica is a device with a folder of its own.
        caches.append(StageCache(store, f"replica{len(caches)}", stage, "raw"))
        return caches[-1]

    replicated = stages_of(2, (2, 2), ((0, 1), (0, 1)))
    with pipeline_of(spec, replicated, activation_cache=cache_of) as pipeline:
        cached = Cached(pipeline, caches)
        decisions = []
        for epoch in range(EPOCHS):
            decisions.append(train(pipeline, batches, first_step=2 * epoch))
            runs = cached.counts()
        state = pipeline.state()
    for cache in caches:
        cache.close()

    assert_as_uncached((decisions, state), model_dirs["llama"])
    assert set(runs.values()) == {0}


@pytest.mark.parametrize(("codec", "tolerance"), [("bf16", 0.02), ("int8", 0.02), ("int4", 0.3)])
def test_compressed_states_give_nearly_the_same_losses_in_fewer_bytes(model_dirs, root, codec, tolerance):
    spec = make_spec(model_dirs["llama"]).model_copy(update={"method": SIDE})
    raw_folder, folder = root(), root()
    raw = epochs(spec, 2, raw_folder, num=2)

    found = epochs(spec, 2, folder, codec=codec, num=2)

    assert set(found[2][1].values()) == {0}
    assert found[0][0] == raw[0][0]
    for decision, expected in zip(found[0][1], raw[0][1], strict=True):
        assert decision.loss == pytest.approx(expected.loss, abs=tolerance)
        assert decision.loss != expected.loss
    assert size(folder) < 0.6 * size(raw_folder)


def size(folder):
    return sum(path.stat().st_size for path in folder.rglob("*.data"))


def test_states_are_named_by_their_place_in_the_model_and_rows_by_their_tokens(model_dirs, root):
    spec = make_spec(model_dirs["llama"]).model_copy(update={"method": UPPER})
    with pipeline_of(spec, stages_of(3)) as pipeline:
        names = [state_names(executor.stage) for executor in pipeline.executors.values()]
    rows = make_batches(num_steps=1)[0].rows[0]
    raw, coded = row_keys(rows, "raw"), row_keys(rows, "int8")

    assert names == [(), ("h2", "h3"), ("h4", "final")]
    assert raw.shape == coded.shape == (len(rows.lengths), 16)
    assert torch.equal(raw, row_keys(rows, "raw"))
    # To the bit only in the same place of the same shape; compressed wherever the tokens come.
    assert len({bytes(key) for key in torch.cat([raw, coded]).numpy()}) == 2 * len(rows.lengths)
