"""Frozen blocks and cache entries that go a step ahead: the same bits, whether there was time for them or not."""

from __future__ import annotations

import pytest

from edge_node.engine.frozen_ahead import FrozenAhead
from edge_node.engine.step_gradients import StepGradients
from edge_node.engine.unit import UnitInput
from plutino.errors import ActivationCacheError
from plutino.types import Unit, UnitKind
from tests.numerics.pipelines import (
    Batch,
    assert_same_tensors,
    make_batches,
    make_spec,
    pipeline_of,
    run_step,
    stages_of,
)
from tests.numerics.test_pac_from_cache import EPOCHS, SIDE, Devices, uncached

ONE_STAGE = stages_of(1, (2,), ((1, 0, 0, 1),))


class Feeds:
    """The steps of a few epochs, one known ahead of the other."""

    def __init__(self, batches):
        self.batches = batches * EPOCHS
        self.step = 0

    def following(self):
        step = self.step + 1
        if step >= len(self.batches):
            return None
        batch = self.batches[step]
        return UnitInput(Unit(UnitKind.TRAIN, step), len(batch.rows), batch.loss_weight, tuple(batch.rows))


@pytest.fixture
def taken(monkeypatch):
    """Gives workers time in every step; counts the micro-batches whose frozen part had run before their step."""
    monkeypatch.setattr(StepGradients, "is_summing", property(lambda _: True))
    take, found = FrozenAhead.take, []

    def counted(ahead, work):
        parts = take(ahead, work)
        found.extend(parts)
        return parts

    monkeypatch.setattr(FrozenAhead, "take", counted)
    return found


def trained_ahead(spec, feeds, state=None, first_step=0, **options):
    with pipeline_of(spec, ONE_STAGE, **options) as pipeline:
        if state is not None:
            pipeline.restore(state)
        for executor in pipeline.executors.values():
            executor.look_ahead(feeds.following)
        decisions = []
        for step, batch in enumerate(feeds.batches[first_step:], first_step):
            feeds.step = step
            decisions.append(run_step(pipeline, step, batch))
        return decisions, pipeline.state(), pipeline.snapshot()


def in_order(epochs):
    return [decision for epoch in epochs for decision in epoch]


@pytest.mark.parametrize("model", ["llama", pytest.param("gpt2", marks=pytest.mark.slow)])
def test_frozen_blocks_that_run_a_step_ahead_change_no_bit(model_dirs, taken, model):
    spec = make_spec(model_dirs[model]).model_copy(update={"method": SIDE})
    batches = make_batches(num_steps=2)
    expected, adapter = uncached(spec, batches)

    decisions, state, _ = trained_ahead(spec, Feeds(batches))

    assert decisions == in_order(expected)
    assert_same_tensors(state, adapter)
    # Of each of two workers one micro-batch in every step but the first.
    assert len(taken) == 2 * (EPOCHS * len(batches) - 1)


def test_entries_written_and_read_a_step_ahead_change_no_bit(model_dirs, taken, tmp_path):
    spec = make_spec(model_dirs["llama"]).model_copy(update={"method": SIDE})
    batches = make_batches(num_steps=2)
    expected, adapter = uncached(spec, batches)
    devices = Devices(tmp_path, 2)

    decisions, state, _ = trained_ahead(spec, Feeds(batches), activation_cache=devices.caches_in_order())
    written = sum(cache.counts.rows_written for cache in devices.caches)
    devices.close()

    assert decisions == in_order(expected)
    assert_same_tensors(state, adapter)
    assert written == sum(len(rows.lengths) for batch in batches for rows in batch.rows)
    assert len(taken) == 2 * (EPOCHS * len(batches) - 1)


def test_worker_without_backbone_reads_a_step_ahead_and_a_missing_entry_ends_only_the_step_that_needs_it(
    model_dirs, taken, tmp_path
):
    spec = make_spec(model_dirs["llama"]).model_copy(update={"method": SIDE})
    batches = make_batches(num_steps=2)
    expected, adapter = uncached(spec, batches)
    devices = Devices(tmp_path, 2)
    first = Feeds(batches)
    first.batches = batches
    _, _, snapshot = trained_ahead(spec, first, activation_cache=devices.caches_in_order())
    devices.close()
    taken.clear()

    options = {"activation_cache": devices.caches_in_order(), "from_cache": True}
    later, state, _ = trained_ahead(spec, Feeds(batches), snapshot, len(batches), **options)
    devices.close()
    assert later == in_order(expected[1:])
    assert_same_tensors(state, adapter)
    assert len(taken) == 2 * ((EPOCHS - 1) * len(batches) - 1)

    unknown = Feeds([*batches[:1], Batch(make_batches(num_steps=3)[1].rows)])
    decisions = []
    with pipeline_of(spec, ONE_STAGE, activation_cache=devices.caches_in_order(), from_cache=True) as pipeline:
        for executor in pipeline.executors.values():
            executor.look_ahead(unknown.following)
        decisions.append(run_step(pipeline, 0, unknown.batches[0]))
        with pytest.raises(ActivationCacheError, match="goes back to the pipeline"):
            run_step(pipeline, 1, unknown.batches[1])
    devices.close()
    assert len(decisions) == 1


def test_rows_that_were_fed_again_do_not_use_what_ran_on_the_first_ones(model_dirs, taken):
    spec = make_spec(model_dirs["llama"]).model_copy(update={"method": SIDE})
    batches = make_batches(num_steps=2)
    expected, _ = uncached(spec, batches)
    feeds = Feeds(batches)
    again = make_batches(num_steps=2) * EPOCHS

    with pipeline_of(spec, ONE_STAGE) as pipeline:
        for executor in pipeline.executors.values():
            executor.look_ahead(feeds.following)
        decisions = []
        for step, batch in enumerate(again):
            feeds.step = step
            decisions.append(run_step(pipeline, step, batch))

    assert decisions == in_order(expected)
    assert not taken
