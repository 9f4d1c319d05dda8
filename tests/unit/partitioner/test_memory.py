from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from partitioner.activations import block_kinds, block_token_bytes, saved_block_bytes
from partitioner.memory import MemoryModel, stage_memory
from partitioner.micro_batch import candidate_rows, lightest_shapes, with_rows
from partitioner.model import describe_model
from partitioner.place import micro_batches_in_flight
from plutino.errors import PlanError
from plutino.families import family_of
from plutino.job.method import AdaptersConfig, FullConfig, LoraConfig, ParallelAdaptersConfig, PrefixConfig
from plutino.sizes import MIB
from tests.unit.partitioner.fleet import gpt2, job, llama, llama_config, llama_tensors

NUM_BLOCKS = 8
TABLES = {"llama": llama(NUM_BLOCKS), "gpt2": gpt2(NUM_BLOCKS)}


def bill(table, shape, start=0, end=None, *, num_stages=1, stage_index=0, checkpointing=False):
    items = stage_memory(
        table,
        shape,
        start_block=start,
        end_block=table.num_blocks if end is None else end,
        num_stages=num_stages,
        stage_index=stage_index,
        checkpointing=checkpointing,
    )
    return {item.name: item.bytes for item in items}


def total(*args, **kwargs):
    return sum(bill(*args, **kwargs).values())


@pytest.mark.parametrize("family", TABLES)
@pytest.mark.parametrize("checkpointing", [False, True])
@settings(max_examples=50, deadline=None)
@given(rank=st.integers(1, 32), rows=st.integers(1, 8), end=st.integers(1, NUM_BLOCKS - 1))
def test_memory_grows_with_rank_rows_and_blocks(family, checkpointing, rank, rows, end):
    table = TABLES[family]
    place = {"num_stages": 2, "stage_index": 0, "checkpointing": checkpointing}

    def peak_bytes(rank, rows, end):
        # A batch of many micro-batches: with fewer than stages, fewer are in flight.
        shape = job(table, LoraConfig(rank=rank), micro_batch_rows=rows, batch_rows=64)
        return total(table, shape, 0, end, **place)

    here = peak_bytes(rank, rows, end)

    assert peak_bytes(rank + 1, rows, end) > here
    assert peak_bytes(rank, rows + 1, end) > here
    assert end == NUM_BLOCKS - 1 or peak_bytes(rank, rows, end + 1) > here


@pytest.mark.parametrize(("stage_index", "expected"), [(0, 4), (1, 3), (2, 2), (3, 1)])
def test_micro_batches_in_flight_falls_by_one_from_stage_to_stage(stage_index, expected):
    assert micro_batches_in_flight(4, stage_index, num_micro_batches=16) == expected
    assert micro_batches_in_flight(4, stage_index, num_micro_batches=2) == min(2, expected)


def test_memory_activations_follow_the_place_in_the_pipeline():
    table = llama(NUM_BLOCKS)
    shape = job(table, batch_rows=32)

    first, second, third = (
        bill(table, shape, 2 * k + 1, 2 * k + 3, num_stages=5, stage_index=k + 1)["activations"] for k in range(3)
    )

    assert first * 2 == third * 4 and second * 2 == third * 3


def test_memory_checkpointing_keeps_less_without_changing_anything_held():
    table = llama(NUM_BLOCKS)
    off, on = (bill(table, job(table), checkpointing=choice) for choice in (False, True))

    assert on["activations"] < off["activations"] / 3
    assert {name: on[name] for name in ("weights", "adapter and optimiser")} == {
        name: off[name] for name in ("weights", "adapter and optimiser")
    }


def test_memory_trainable_parameter_costs_sixteen_bytes_and_a_shadow_of_twelve():
    table = llama(2)
    shape = job(table)

    items = bill(table, shape)

    assert items["adapter and optimiser"] == 16 * sum(shape.adapter_params)
    assert items["shadow snapshot"] == 12 * sum(shape.adapter_params)


def test_memory_tied_head_is_counted_once_on_a_single_stage_and_twice_on_two():
    table = llama(2)
    shape = job(table)

    whole = bill(table, shape)["weights"]
    halves = [bill(table, shape, k, k + 1, num_stages=2, stage_index=k)["weights"] for k in range(2)]

    assert whole == 4 * (sum(table.block_params) + table.embedding_params + table.final_params)
    assert sum(halves) == whole + 4 * table.head_params


def test_memory_logits_only_on_the_last_stage_and_for_label_tokens():
    table = llama(2)
    # So many that the loss exceeds the temporaries of a block's backward pass, which come after it.
    few, many = (job(table, label_tokens=n) for n in (1000, 1010))

    assert "logits and loss" not in bill(table, few, 0, 1, num_stages=2, stage_index=0)
    grown = bill(table, many)["logits and loss"] - bill(table, few)["logits and loss"]
    assert grown == 10 * (3 * 4 * table.vocab_size + 8 * table.hidden_size)


def test_memory_blocks_below_the_lowest_adapter_keep_nothing():
    table = llama(4)
    shape = job(table, LoraConfig(blocks=(2, 3)))

    frozen = bill(table, shape, 0, 2, num_stages=2, stage_index=0)["activations"]
    trained = bill(table, shape, 2, 4, num_stages=2, stage_index=1)["activations"]

    assert frozen < trained / 10


def test_memory_bf16_halves_weights_and_not_the_adapter():
    table = llama(2)
    fp32, bf16 = (bill(table, job(table, dtype=dtype)) for dtype in ("fp32", "bf16"))

    assert bf16["weights"] * 2 == fp32["weights"]
    assert bf16["adapter and optimiser"] == fp32["adapter and optimiser"]


def test_memory_bf16_codec_halves_the_wire_queues_messages():
    table = llama(2)
    place = {"num_stages": 2, "stage_index": 0}
    raw, coded = (bill(table, job(table, codec=codec), 0, 1, **place)["wire queues"] for codec in ("raw", "bf16"))

    streams_bytes = 2 * coded - raw
    assert 2 * (coded - streams_bytes) == raw - streams_bytes > 0


def test_memory_generation_counts_only_what_training_does_not_free():
    table = llama(2)
    short = bill(table, job(table, generate_rows=1, generate_tokens=8))
    long = bill(table, job(table, generate_rows=256, generate_tokens=512))

    assert "generation" not in short
    assert long["generation"] > 0


@pytest.mark.parametrize("blocks", [(0, 0), (3, 2), (0, 5), (-1, 2)])
def test_memory_of_blocks_that_do_not_exist_is_refused(blocks):
    table = llama(4)

    with pytest.raises(PlanError, match="does not exist in a model of 4 blocks"):
        bill(table, job(table), *blocks)


def test_memory_model_adapter_of_another_model_is_refused():
    with pytest.raises(PlanError, match="described for 3 blocks, the model has 4"):
        MemoryModel(llama(4), job(llama(3)))


def heap_bill(*, row_tokens, checkpointing, keeps_heap):
    # Hidden states of 64 numbers in fp32: 256 KiB, from which on they are mapped, are 1024 tokens.
    table = llama(NUM_BLOCKS)
    shape = job(table, row_tokens=row_tokens, micro_batch_rows=2, batch_rows=2, label_tokens=8)
    items = MemoryModel(table, shape).items(
        0, NUM_BLOCKS, num_stages=1, stage_index=0, checkpointing=checkpointing, keeps_heap=keeps_heap
    )
    return {item.name: item.bytes for item in items}


@pytest.mark.parametrize("row_tokens", [64, 2048])
def test_memory_recomputed_blocks_leave_on_the_heap_what_kept_ones_do(row_tokens):
    def left_bytes(checkpointing):
        found = heap_bill(row_tokens=row_tokens, checkpointing=checkpointing, keeps_heap=True)
        return found["allocator"] + found.get("heap reuse", 0)

    kept = heap_bill(row_tokens=row_tokens, checkpointing=False, keeps_heap=False)["activations"]

    # The inputs of recomputed blocks come on top; the largest of a block's temporaries are the same.
    assert left_bytes(False) <= left_bytes(True) <= left_bytes(False) + 0.2 * kept


def test_memory_tensors_too_small_for_mappings_lie_on_the_heap_whether_it_is_kept_or_not():
    for row_tokens, is_on_heap in ((511, True), (512, False)):
        kept, exact = (heap_bill(row_tokens=row_tokens, checkpointing=True, keeps_heap=heap) for heap in (True, False))
        assert ("heap reuse" not in kept) == is_on_heap
        assert (kept == exact) == is_on_heap
        assert "heap reuse" not in exact


MEASURED_MIB = [
    # tokens of 2 rows or of 1, rank, dtype, checkpointing, keeps heap: peak of the job's resident memory.
    (64, 16, "fp32", True, True, 340.7),
    (64, 16, "fp32", True, False, 337.7),
    (64, 16, "fp32", False, True, 359.0),
    (64, 16, "fp32", False, False, 359.3),
    (64, 64, "fp32", True, False, 520.9),
    (64, 64, "fp32", False, False, 521.2),
    (64, 4, "fp32", True, False, 301.4),
    (64, 4, "fp32", False, True, 322.8),
    (64, 16, "bf16", True, False, 222.0),
    (64, 16, "bf16", False, False, 233.2),
    (256, 16, "fp32", True, True, 492.7),
    (256, 16, "fp32", True, False, 339.3),
    (256, 16, "fp32", False, True, 582.9),
    (512, 16, "fp32", True, True, 636.4),
]
"""Of a process with a worker's allocator that trained 8 blocks of width 768 for 5 steps of 4 micro-batches beside
snapshots, as tests/numerics/recompute_peak.py does; in bf16 with micro-batches of 20 lengths."""


@pytest.mark.parametrize("case", MEASURED_MIB, ids=str)
def test_memory_bill_is_never_below_what_was_measured_and_within_a_tenth_of_it(case):
    tokens, rank, dtype, checkpointing, keeps_heap, measured_mib = case
    config = llama_config(8, **WIDE)
    table = describe_model(config, llama_tensors(config), family_of("llama"))
    rows = 1 if tokens == 64 else 2
    shape = job(
        table,
        LoraConfig(rank=rank),
        dtype=dtype,
        micro_batch_rows=rows,
        batch_rows=4 * rows,
        row_tokens=tokens // rows,
        label_tokens=tokens // 3,
    )

    items = MemoryModel(table, shape).items(
        0, 8, num_stages=1, stage_index=0, checkpointing=checkpointing, keeps_heap=keeps_heap
    )

    assert 0.9 <= measured_mib * MIB / sum(item.bytes for item in items) <= 1.0


WIDE = {
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_attention_heads": 12,
    "num_key_value_heads": 12,
    "vocab_size": 4096,
    "tie_word_embeddings": False,
}

METHODS = [
    LoraConfig(),
    LoraConfig(rank_pattern={"layers.2.*q_proj": 3}),
    LoraConfig(blocks=(3, 5), use_dora=True),
    LoraConfig(target_modules=("q_proj", "v_proj"), dropout=0.1),
    ParallelAdaptersConfig(reduction=4),
    ParallelAdaptersConfig(reduction=4, blocks=(2, 4, 5)),
    AdaptersConfig(blocks=(4,)),
    PrefixConfig(),
    FullConfig(),
]


@pytest.mark.parametrize("method", METHODS, ids=[f"{i} {method.type}" for i, method in enumerate(METHODS)])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_memory_blocks_of_one_kind_keep_the_same(method, dtype):
    table = llama(NUM_BLOCKS)
    shape = job(table, method, dtype=dtype, generate_rows=2, generate_tokens=8)

    kinds = block_kinds(table, shape)

    for block, kind in enumerate(kinds):
        assert saved_block_bytes(table, shape, block) == saved_block_bytes(table, shape, kind)
        assert block_token_bytes(table, shape, block, 8) == block_token_bytes(table, shape, kind, 8)
        assert shape.adapter_params[block] == shape.adapter_params[kind]
    assert len(set(kinds)) < NUM_BLOCKS


@pytest.mark.parametrize("batch_rows", [12, 16])
@pytest.mark.parametrize("row_tokens", [16, 48, 96, 300])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_memory_no_micro_batch_holds_less_than_the_lightest(batch_rows, row_tokens, checkpointing):
    table = llama(4)
    shape = job(table, row_tokens=row_tokens, label_tokens=1, batch_rows=batch_rows, micro_batch_rows=batch_rows)
    lightest = lightest_shapes(table, shape)

    def least(shapes):
        return min(total(table, one, checkpointing=checkpointing) for one in shapes)

    assert least(lightest) == least(with_rows(shape, rows) for rows in candidate_rows(batch_rows))
    is_mapped_from_some_rows_on = 1024 // batch_rows < row_tokens < 1024
    assert len(lightest) == 1 + is_mapped_from_some_rows_on
