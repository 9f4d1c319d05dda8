"""Epochs without the backbone, data-parallel from the activation cache: the bits of the pipeline, for any devices."""

from __future__ import annotations

import pytest
import torch

from edge_node.activation_cache.stage_cache import StageCache
from edge_node.activation_cache.store import ActivationStore
from edge_node.transport.base import Peer
from plutino.errors import ActivationCacheError
from plutino.job.assignment import StageShape
from plutino.job.method import ParallelAdaptersConfig
from tests.numerics.pipelines import assert_same_tensors, make_batches, make_spec, pipeline_of, stages_of, train

SIDE = ParallelAdaptersConfig(reduction=2)
UPPER = ParallelAdaptersConfig(reduction=2, blocks=(2, 3))
MIB = 1 << 20
EPOCHS = 3
OWNERS = {1: (0,), 2: (1, 0, 0, 1), 3: (2, 0, 1)}
"""Place of a step -> device, by number of devices."""


class Devices:
    """The caches of a few devices: a folder each, which outlives their workers."""

    def __init__(self, folder, num_devices, codec="raw", budget_bytes=64 * MIB):
        self.stores = [ActivationStore(folder / f"device{i}", budget_bytes) for i in range(num_devices)]
        self.codec = codec
        self.caches = []

    def caches_in_order(self):
        """Makes the caches of workers that are built in the order of devices."""
        stores = iter(self.stores)
        self.caches = []

        def cache_of(stage):
            self.caches.append(StageCache(next(stores), "tiny", stage, self.codec))
            return self.caches[-1]

        return cache_of

    def close(self):
        for cache in self.caches:
            cache.close()


def first_epoch(spec, devices, batches):
    """The pipeline, one stage a device: decisions, training state."""
    num = len(devices.stores)
    owners = [Peer(device) for device in OWNERS[num]]
    options = {"activation_cache": devices.caches_in_order(), "entry_owners": owners if num > 1 else ()}
    with pipeline_of(spec, stages_of(num), **options) as pipeline:
        decisions = train(pipeline, batches)
        state = pipeline.snapshot()
    devices.close()
    return decisions, state


def from_cache(spec, devices, batches, state, first_step, num_epochs):
    """Data-parallel without the backbone: decisions by epoch, adapter."""
    num = len(devices.stores)
    shape = StageShape(start_block=0, end_block=4, num_replicas=num, micro_batch_owner=OWNERS[num] if num > 1 else ())
    decisions = []
    with pipeline_of(spec, [shape], activation_cache=devices.caches_in_order(), from_cache=True) as pipeline:
        pipeline.restore(state)
        for epoch in range(num_epochs):
            decisions.append(train(pipeline, batches, first_step=first_step + epoch * len(batches)))
        weights = [sum(p.numel() for p in e.stage.model.parameters()) for e in pipeline.executors.values()]
        adapter = pipeline.state()
    devices.close()
    return decisions, adapter, weights


def in_stages(spec, devices, batches, num_epochs):
    """The pipeline for one epoch, then its stages without their blocks: decisions by epoch, adapter, weights left."""
    num = len(devices.stores)
    with pipeline_of(spec, stages_of(num), activation_cache=devices.caches_in_order()) as pipeline:
        decisions = [train(pipeline, batches)]
        state = pipeline.snapshot()
    devices.close()
    with pipeline_of(spec, stages_of(num), activation_cache=devices.caches_in_order(), from_cache=True) as pipeline:
        pipeline.restore(state)
        for epoch in range(1, num_epochs):
            decisions.append(train(pipeline, batches, first_step=epoch * len(batches)))
        weights = [sum(p.numel() for p in e.stage.model.parameters()) for e in pipeline.executors.values()]
        adapter = pipeline.state()
    devices.close()
    return decisions, adapter, weights


def uncached(spec, batches):
    with pipeline_of(spec, stages_of(1)) as pipeline:
        decisions = [train(pipeline, batches, first_step=epoch * len(batches)) for epoch in range(EPOCHS)]
        return decisions, pipeline.state()


@pytest.mark.parametrize(
    ("model", "method"),
    [
        ("llama", UPPER),
        pytest.param("tied_llama", SIDE, marks=pytest.mark.slow),
        pytest.param("gpt2", SIDE, marks=pytest.mark.slow),
    ],
)
def test_epochs_without_the_backbone_on_1_2_and_3_devices_have_the_bits_of_uncached_ones(
    model_dirs, tmp_path, model, method
):
    spec = make_spec(model_dirs[model]).model_copy(update={"method": method})
    batches = make_batches(num_steps=2)
    expected, expected_adapter = uncached(spec, batches)

    for num_devices in (1, 2, 3):
        devices = Devices(tmp_path / f"{num_devices}", num_devices)
        first, state = first_epoch(spec, devices, batches)
        later, adapter, weights = from_cache(spec, devices, batches, state, len(batches), EPOCHS - 1)

        assert [first, *later] == expected
        assert_same_tensors(adapter, expected_adapter)
        # Of the backbone the head and the final norm are left.
        vocabulary, width = 64, 32
        assert all(number <= vocabulary * width + 2 * width for number in weights)


def test_epochs_without_the_backbone_in_2_and_3_stages_have_the_bits_of_uncached_ones(model_dirs, tmp_path):
    spec = make_spec(model_dirs["llama"]).model_copy(update={"method": SIDE})
    batches = make_batches(num_steps=2)
    expected, expected_adapter = uncached(spec, batches)

    for num_stages in (2, 3):
        devices = Devices(tmp_path / f"{num_stages}", num_stages)
        decisions, adapter, weights = in_stages(spec, devices, batches, EPOCHS)

        assert decisions == expected
        assert_same_tensors(adapter, expected_adapter)
        # The last stage has the head and the final norm, the others nothing of the model.
        vocabulary, width = 64, 32
        assert weights[:-1] == [0] * (num_stages - 1) and weights[-1] <= vocabulary * width + 2 * width


def test_second_epoch_of_the_pipeline_hands_no_entry_over_again(model_dirs, tmp_path):
    spec = make_spec(model_dirs["llama"]).model_copy(update={"method": SIDE})
    devices, batches = Devices(tmp_path, 2), make_batches(num_steps=2)
    owners = [Peer(device) for device in OWNERS[2]]
    sent_bytes = []
    with pipeline_of(spec, stages_of(2), activation_cache=devices.caches_in_order(), entry_owners=owners) as pipeline:
        for executor in pipeline.executors.values():
            send = executor.transport.send

            def measuring(peer, key, tensors, send=send, **options):
                sent_bytes[-1] += len(tensors["data"]) if "data" in tensors else 0
                return send(peer, key, tensors, **options)

            executor.transport.send = measuring
        for epoch in range(2):
            sent_bytes.append(0)
            train(pipeline, batches, first_step=epoch * len(batches))
    devices.close()

    assert sent_bytes[0] > 0
    assert sent_bytes[1] == 0


def test_owner_without_room_counts_the_rows_that_it_lacks(model_dirs, tmp_path):
    spec = make_spec(model_dirs["llama"]).model_copy(update={"method": SIDE})
    devices, batches = Devices(tmp_path, 2), make_batches(num_steps=2)
    devices.stores[0] = ActivationStore(tmp_path / "small", 40_000)
    first_epoch(spec, devices, batches)

    assert devices.caches[0].counts.rows_left_out > 0
    assert devices.caches[1].counts.rows_left_out == 0


def test_row_that_a_device_without_backbone_lacks_ends_its_worker_with_the_reason(model_dirs, tmp_path):
    spec = make_spec(model_dirs["llama"]).model_copy(update={"method": SIDE})
    devices, batches = Devices(tmp_path, 2), make_batches(num_steps=2)
    _, state = first_epoch(spec, devices, batches)
    for path in (tmp_path / "device1" / "tiny").glob("h2.data"):
        data = bytearray(path.read_bytes())
        data[8] ^= 1
        path.write_bytes(data)

    with pytest.raises(ActivationCacheError, match="goes back to the pipeline"):
        from_cache(spec, devices, batches, state, len(batches), 1)
    devices.close()


@pytest.mark.slow
def test_pruned_side_network_goes_on_from_the_trained_values(model_dirs, tmp_path):
    pruned = ParallelAdaptersConfig(reduction=2, init="pruning")
    spec = make_spec(model_dirs["llama"]).model_copy(update={"method": pruned})
    batches = make_batches(num_steps=2)
    expected, expected_adapter = uncached(spec, batches)
    devices = Devices(tmp_path, 2)
    first, state = first_epoch(spec, devices, batches)
    later, adapter, _ = from_cache(spec, devices, batches, state, len(batches), EPOCHS - 1)

    assert [first, *later] == expected
    assert all(torch.equal(adapter[name], value) for name, value in expected_adapter.items())
