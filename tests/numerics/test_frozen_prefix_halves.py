"""Frozen prefixes of encoder-decoders: what is kept below a block of either half, and what later epochs leave out."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import pytest

from edge_node.activation_cache.stage_cache import StageCache
from edge_node.activation_cache.store import ActivationStore
from edge_node.transport.base import MessageKind
from plutino.job.assignment import StageShape
from plutino.job.method import AdaptersConfig, LoraConfig
from plutino.job.objective import Seq2SeqConfig
from tests.numerics.pipelines import assert_same_tensors, make_batches, make_spec, pipeline_of, train
from tests.numerics.tiny_families import ENCODER_DECODERS, save_model
from tests.sampling import sampled

NUM_ENCODER_BLOCKS, NUM_BLOCKS, NUM_EPOCHS = 2, 4, 2
MIB = 1 << 20


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    return {name: save_model(name, tmp_path_factory.mktemp(name)) for name in ENCODER_DECODERS}


def lora(place):
    return LoraConfig(rank=4, dropout=0.1, blocks=tuple(range(place, NUM_BLOCKS)))


def spec_of(folder, method, activation_cache="raw"):
    spec = make_spec(folder)
    training = spec.training.model_copy(update={"activation_cache": activation_cache})
    return spec.model_copy(update={"objective": Seq2SeqConfig(), "method": method, "training": training})


def stages_cut_at(*borders):
    cuts = (0, *borders, NUM_BLOCKS)
    return [StageShape(start_block=start, end_block=end) for start, end in pairwise(cuts)]


class Watched:
    """Which blocks of a pipeline run in an epoch, and which states go up."""

    def __init__(self, pipeline):
        self._runs, self._sent = Counter(), set()
        for me, executor in pipeline.executors.items():
            stage, send = executor.stage, executor.transport.send
            for block in range(stage.start_block, stage.end_block):
                module = stage.model.get_submodule(stage.family.block_name(block, stage.num_encoder_blocks))
                module.register_forward_hook(lambda *_, block=block: self._runs.update([block]))

            def watching(peer, key, tensors, me=me, send=send, **options):
                if key.kind == MessageKind.FORWARD:
                    names = {name for name, tensor in tensors.items() if tensor.is_floating_point()}
                    self._sent.update((me.stage_index, name) for name in names)
                return send(peer, key, tensors, **options)

            executor.transport.send = watching

    def take(self):
        """Runs by block, and (stage, state) of what was sent, since the last time."""
        found = dict(self._runs), self._sent
        self._runs, self._sent = Counter(), set()
        return found


def epochs(spec, stages, root, *, num=NUM_EPOCHS, between=lambda: None, budget_bytes=64 * MIB, **options):
    """Decisions by epoch, adapter, what was watched by epoch, the stages' caches."""
    caches, store = [], ActivationStore(root, budget_bytes)

    def cache_of(stage):
        caches.append(StageCache(store, "tiny", stage, spec.training.activation_cache))
        return caches[-1]

    batches, decisions, seen = make_batches(num_steps=2), [], []
    with pipeline_of(spec, stages, activation_cache=cache_of, **options) as pipeline:
        watched = Watched(pipeline)
        for epoch in range(num):
            decisions.append(train(pipeline, batches, first_step=epoch * len(batches)))
            seen.append(watched.take())
            between()
        state = pipeline.state()
    for cache in caches:
        cache.close()
    return decisions, state, seen, caches


def uncached(folder, method, num=NUM_EPOCHS):
    batches = make_batches(num_steps=2)
    with pipeline_of(spec_of(folder, method, "off"), stages_cut_at()) as pipeline:
        decisions = [train(pipeline, batches, first_step=epoch * len(batches)) for epoch in range(num)]
        return decisions, pipeline.state()


def sent_in_later_epochs(stages, place):
    """(stage, state) of what later epochs send up."""
    sent = set()
    for index, stage in enumerate(stages[:-1]):
        if stage.end_block > place:
            sent |= {(index, "source"), (index, "hidden")}
        elif place < NUM_ENCODER_BLOCKS:
            sent.add((index, "hidden"))  # the target's embeddings, which the first stage makes
    return sent


# Cut nowhere, inside the encoder, between the halves, inside the decoder.
CASES = [(name, place, border) for name in ENCODER_DECODERS for place in (1, 2, 3) for border in (None, 1, 2, 3)]


@pytest.mark.parametrize(
    ("name", "place", "border"),
    sampled(
        CASES,
        4,
        always=(("t5", 1, None), ("t5", 3, 2), ("bart", 1, 2), ("bart", 2, 3)),
    ),
)
def test_cached_epochs_run_only_from_the_lowest_trained_block_up_and_have_the_bits_of_uncached_ones(
    folders, tmp_path, name, place, border
):
    stages = stages_cut_at() if border is None else stages_cut_at(border)

    decisions, state, (first, *later), caches = epochs(spec_of(folders[name], lora(place)), stages, tmp_path)

    expected = uncached(folders[name], lora(place))
    assert decisions == expected[0]
    assert_same_tensors(state, expected[1])
    assert set(first[0]) == set(range(NUM_BLOCKS))
    for runs, sent in later:
        assert runs == {block: first[0][block] for block in range(place, NUM_BLOCKS)}
        assert sent == sent_in_later_epochs(stages, place)
    assert not sum(cache.counts.rows_left_out for cache in caches)


def test_cached_epochs_with_checkpointing_and_a_border_on_either_side_of_the_place_have_the_same_bits(
    folders, tmp_path
):
    stages, method = stages_cut_at(1, 3), AdaptersConfig(bottleneck=4, blocks=(3,))

    decisions, state, (_, later), _ = epochs(spec_of(folders["t5"], method), stages, tmp_path / "three")
    # The second job's entries are the first one's: kept behind a border, put back inside a stage.
    other, _, ((runs, _),), _ = epochs(
        spec_of(folders["t5"], lora(3)), stages_cut_at(2), tmp_path / "three", num=1, checkpointing=True
    )

    expected = uncached(folders["t5"], method)
    assert decisions == expected[0]
    assert_same_tensors(state, expected[1])
    assert set(later[0]) == set(runs) == {3}
    assert other == uncached(folders["t5"], lora(3), num=1)[0]


@pytest.mark.parametrize("state", ["source", pytest.param("t3", marks=pytest.mark.slow)])
def test_damaged_half_of_an_entry_is_computed_again_and_moves_no_bit(folders, tmp_path, state):
    def damage():
        path = tmp_path / "tiny" / f"{state}.data"
        data = bytearray(path.read_bytes())
        data[40] ^= 1
        with path.open("r+b") as file:  # in place, so that whoever mapped it sees it
            file.write(data)

    decisions, _, (first, later), caches = epochs(
        spec_of(folders["bart"], lora(3)), stages_cut_at(3), tmp_path, between=damage
    )

    assert decisions == uncached(folders["bart"], lora(3))[0]
    assert 0 < later[0][0] < first[0][0]
    assert sum(cache.num_damaged for cache in caches) == 1


def test_rows_without_room_run_through_all_blocks_in_every_epoch(folders, tmp_path):
    decisions, _, (first, later), caches = epochs(
        spec_of(folders["t5"], lora(2)), stages_cut_at(2), tmp_path, budget_bytes=8_000
    )

    assert decisions == uncached(folders["t5"], lora(2))[0]
    assert 0 < later[0][0] < first[0][0]
    assert sum(cache.counts.rows_written for cache in caches)
    assert sum(cache.counts.rows_left_out for cache in caches)


def test_replicas_on_one_machine_keep_their_rows_in_the_same_files(folders, tmp_path):
    replicas = StageShape(start_block=0, end_block=NUM_BLOCKS, num_replicas=2, micro_batch_owner=(0, 1))

    decisions, _, (_, later), caches = epochs(spec_of(folders["bart"], lora(3)), [replicas], tmp_path)

    assert decisions == uncached(folders["bart"], lora(3))[0]
    assert set(later[0]) == {3}
    assert all(cache.counts.rows_written and not cache.counts.rows_left_out for cache in caches)
    assert len(list(tmp_path.rglob("*.data"))) == 2
