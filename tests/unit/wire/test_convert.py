from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from plutino.data.batches import MicroBatchRows
from plutino.errors import FrameError
from plutino.wire.convert import (
    micro_batch_from_proto,
    micro_batch_to_proto,
    row_values_from_proto,
    row_values_to_proto,
)
from protos import workers_pb2


def micro_batch() -> MicroBatchRows:
    return MicroBatchRows(
        lengths=np.array([3, 2], np.int32),
        input_ids=np.array([5, 6, 7, 8, 9], np.int32),
        label_mask=np.array([0, 1, 1, 0, 1], np.uint8),
        padded_tokens=4,
        sample_indices=(11, 3),
    )


def micro_batch_of_pairs() -> MicroBatchRows:
    return replace(
        micro_batch(),
        segment_lengths=np.array([1, 2, 2], np.int32),
        labels=np.array([2.0, 0.25], np.float32),
        pair_ids=np.array([0, 0], np.int32),
        reference_logps=np.array([-7.5, -3.25], np.float32),
        length_discount=1.0,
    )


def decode(message: workers_pb2.MicroBatch, sample_indices: tuple[int, ...] = ()) -> MicroBatchRows:
    return micro_batch_from_proto(message, max_rows=2, max_tokens=4, vocab_size=10, sample_indices=sample_indices)


def test_micro_batch_survives_the_wire() -> None:
    sent = micro_batch()
    message = workers_pb2.MicroBatch.FromString(micro_batch_to_proto(sent).SerializeToString())

    received = decode(message, sent.sample_indices)

    for name in ("lengths", "input_ids", "label_mask"):
        assert getattr(received, name).tolist() == getattr(sent, name).tolist()
        assert getattr(received, name).dtype == getattr(sent, name).dtype
    assert (received.padded_tokens, received.sample_indices) == (4, (11, 3))


def test_what_an_objective_needs_of_rows_survives_the_wire() -> None:
    sent = micro_batch_of_pairs()
    message = workers_pb2.MicroBatch.FromString(micro_batch_to_proto(sent).SerializeToString())

    received = decode(message, sent.sample_indices)

    for name in ("segment_lengths", "labels", "pair_ids", "reference_logps"):
        assert getattr(received, name).tolist() == getattr(sent, name).tolist()
        assert getattr(received, name).dtype == getattr(sent, name).dtype
        assert getattr(decode(micro_batch_to_proto(micro_batch())), name) is None
    assert (received.length_discount, decode(micro_batch_to_proto(micro_batch())).length_discount) == (1.0, 0.0)


def test_row_values_survive_the_wire_and_a_wrong_number_of_them_is_refused() -> None:
    values = np.array([[0.5, -2.0], [3.0, 4.25]], np.float32)
    message = row_values_to_proto(3, values)

    assert (message.micro_batch, row_values_from_proto(message, num_rows=2).tolist()) == (3, values.tolist())
    with pytest.raises(FrameError, match="16 bytes of row values instead of 24"):
        row_values_from_proto(message, num_rows=3)


def _extend(name: str, *values: float) -> Callable[[workers_pb2.MicroBatch], None]:
    def change(message: workers_pb2.MicroBatch) -> None:
        getattr(message, name)[:] = values

    return change


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (_extend("segment_lengths", 3, 0, 2), "a segment without tokens"),
        (_extend("segment_lengths", 3, 3), "2 segments that do not end with the rows"),
        (_extend("segment_lengths", 2, 3), "2 segments that do not end with the rows"),
        (_extend("labels", 1.0), "1 labels for 2 rows"),
        (_extend("labels", 1.0, float("nan")), "labels that are not finite"),
        (_extend("reference_logps", 1.0, 2.0, 3.0), "3 reference log-probabilities for 2 rows"),
        (_extend("pair_ids", 0, 1), "rows that are not in pairs"),
        (_extend("pair_ids", 2, 2), "pair 2 among 2 rows"),
    ],
)
def test_what_an_objective_needs_of_rows_is_checked(
    change: Callable[[workers_pb2.MicroBatch], None], told: str
) -> None:
    message = micro_batch_to_proto(micro_batch_of_pairs())
    change(message)

    with pytest.raises(FrameError, match=told):
        decode(message)


def test_micro_batch_token_ids_are_little_endian_int32() -> None:
    assert micro_batch_to_proto(micro_batch()).input_ids[:8] == b"\x05\0\0\0\x06\0\0\0"


def _lengths(*lengths: int) -> Callable[[workers_pb2.MicroBatch], None]:
    def change(message: workers_pb2.MicroBatch) -> None:
        message.lengths[:] = lengths

    return change


def _set(name: str, value: object) -> Callable[[workers_pb2.MicroBatch], None]:
    return lambda message: setattr(message, name, value)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (_lengths(), "0 rows where 1 to 2"),
        (_lengths(2, 2, 1), "3 rows where 1 to 2"),
        (_lengths(5, 0), "a row without tokens"),
        (_lengths(3, 5), "a row of 5 tokens in a micro-batch padded to 4"),
        (_lengths(2, 2), "20 bytes of token ids for 4 tokens"),
        (_lengths(4_000_000_000, 1), "a row of 4000000000 tokens"),
        (_set("padded_tokens", 0), "rows of 0 tokens where 1 to 4"),
        (_set("padded_tokens", 5), "rows of 5 tokens where 1 to 4"),
        (_set("input_ids", b"\0" * 19), "19 bytes of token ids"),
        (_set("label_mask", b"\0" * 6), "6 bytes of label mask"),
        (_set("label_mask", b"\0\0\0\0\2"), "label mask value 2"),
        (_set("input_ids", np.array([0, 1, 2, 3, 10], "<i4").tobytes()), "token id 10 outside the vocabulary of 10"),
        (_set("input_ids", np.array([0, 1, -2, 3, 9], "<i4").tobytes()), "token id -2 outside"),
        (_set("length_discount", 1.5), "a length discount of 1.5 where 0 to 1"),
        (_set("length_discount", float("nan")), "a length discount of nan"),
    ],
)
def test_micro_batch_out_of_bounds_is_refused(change: Callable[[workers_pb2.MicroBatch], None], told: str) -> None:
    message = micro_batch_to_proto(micro_batch())
    change(message)

    with pytest.raises(FrameError, match=told):
        decode(message)


def test_micro_batch_with_too_few_sample_indices_is_refused() -> None:
    with pytest.raises(FrameError, match="1 sample indices for 2 rows"):
        decode(micro_batch_to_proto(micro_batch()), (11,))
