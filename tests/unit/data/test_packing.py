from __future__ import annotations

from dataclasses import replace

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from plutino.data.batches import cut_micro_batches
from plutino.data.packing import pack, plan_packs
from plutino.data.samples import Samples


def samples_of(*lengths: int) -> Samples:
    masks = [np.arange(length) > 0 for length in lengths]
    return Samples(
        input_ids=np.arange(sum(lengths), dtype=np.int32),
        label_mask=np.concatenate(masks).astype(np.uint8),
        starts=np.cumsum([0, *lengths], dtype=np.int64),
        prompt_tokens=np.zeros(len(lengths), np.int32),
        line_numbers=np.arange(1, len(lengths) + 1),
        num_truncated=0,
    )


@settings(max_examples=80, deadline=None)
@given(lengths=st.lists(st.integers(1, 16), min_size=1, max_size=60))
def test_every_row_is_in_one_pack_and_none_is_too_long_or_half_empty_beside_another(lengths: list[int]) -> None:
    packs = plan_packs(np.array(lengths, np.int64), 16)

    assert sorted(index for one in packs for index in one) == list(range(len(lengths)))
    totals = [sum(lengths[index] for index in one) for one in packs]
    assert max(totals) <= 16
    # Best fit never opens a pack for what an open one has room for.
    assert sum(total <= 8 for total in totals) <= 1
    assert packs == sorted(packs)


def test_packs_are_those_written_down_for_ever() -> None:
    lengths = np.array([5, 9, 3, 7, 7, 2, 10, 1], np.int64)

    assert plan_packs(lengths, 12) == [[0, 4], [1, 2], [3, 7], [5, 6]]


def test_a_micro_batch_of_packs_knows_every_segment_and_counts_every_label() -> None:
    packed = pack(samples_of(5, 3, 8, 2), 8)
    assert [packed.members(index) for index in range(len(packed))] == [[0, 1], [2], [3]]

    batch = cut_micro_batches(packed, range(3), 2)

    first = batch.micro_batches[0]
    assert first.lengths.tolist() == [8, 8]
    assert first.segment_lengths is not None and first.segment_lengths.tolist() == [5, 3, 8]
    assert first.input_ids[:8].tolist() == list(range(8))
    # What begins a segment has nothing that predicts it.
    assert first.label_mask[:8].tolist() == [0, 1, 1, 1, 1, 0, 1, 1]
    assert batch.loss_weight == 4 + 2 + 7 + 1


def test_packed_rows_are_counted_one_by_one_where_a_loss_is_the_mean_over_rows() -> None:
    rows = samples_of(5, 3, 8, 1)  # the last has no label token
    packed = pack(replace(rows, counted="labelled rows"), 8)

    batch, by_token, by_root = (
        cut_micro_batches(packed, range(len(packed)), 2, counted)
        for counted in (None, "label tokens", "roots of label tokens")
    )

    assert (batch.loss_weight, by_token.loss_weight) == (3, 4 + 2 + 7)
    assert by_root.loss_weight == 4**0.5 + 2**0.5 + 7**0.5
    assert {part.length_discount for part in batch.micro_batches} == {1.0}
    assert {part.length_discount for part in by_token.micro_batches} == {0.0}
