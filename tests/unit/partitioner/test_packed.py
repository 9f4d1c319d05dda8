from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from partitioner.device import LinkTable
from partitioner.explain import explain
from partitioner.packed import UNPACK_SCRATCH_BYTES, WeightSizes, check_scheme, matrix_bytes
from partitioner.scheme_choice import choose_scheme
from partitioner.search import search
from plutino.errors import PlanError, QuantizationError
from plutino.gptq_index import GptqFormat
from plutino.job.model import Packing
from tests.unit.partitioner.fleet import device, gpt2, job, llama
from tests.unit.partitioner.test_memory import bill

NUM_BLOCKS = 4
WIDE = llama(NUM_BLOCKS, hidden_size=256, intermediate_size=512)
ALL = {"is_first": True, "is_last": True}


def sizes(table, **packing):
    return WeightSizes(table, job(table, packing=Packing(**packing)))


def whole(method, table):
    return int(method(np.asarray(0), np.asarray(table.num_blocks), **ALL))


@pytest.mark.parametrize(("scheme", "most_bits"), [("int8", 8.1), ("nf4", 4.13), ("int4", 4.2)])
def test_matrix_bits_with_all_constants_stay_within_the_goal(scheme, most_bits):
    assert 8 * matrix_bytes(scheme, 2048, 2048) / 2048**2 <= most_bits


def test_matrix_bytes_of_nothing_packed_is_refused():
    with pytest.raises(PlanError, match="'none'"):
        matrix_bytes("none", 64, 64)


@pytest.mark.parametrize("table", [WIDE, gpt2(NUM_BLOCKS)], ids=["llama", "gpt2"])
@pytest.mark.parametrize("packing", [{}, {"scheme": "nf4"}, {"scheme": "int8", "embedding": "int8", "head": "int8"}])
def test_weight_sizes_plain_and_packed_parameters_add_up_to_the_model(table, packing):
    found = sizes(table, **packing)
    total = sum(table.block_params) + table.embedding_params + table.final_params
    total += 0 if table.is_tied else table.head_params

    assert whole(found.plain_params, table) + whole(found.packed_params, table) == total
    assert found.unpacked_share == pytest.approx(whole(found.plain_params, table) / total)


def test_weight_sizes_tied_head_held_otherwise_than_the_embedding_is_held_twice():
    alike, apart = sizes(WIDE, scheme="nf4"), sizes(WIDE, scheme="nf4", head="int8")

    assert whole(alike.plain_params, WIDE) == whole(apart.plain_params, WIDE)
    assert whole(apart.packed_params, WIDE) - whole(alike.packed_params, WIDE) == WIDE.vocab_size * WIDE.hidden_size
    assert alike.unpacked_share == apart.unpacked_share


@settings(max_examples=30, deadline=None)
@given(start=st.integers(0, NUM_BLOCKS - 1), data=st.data())
def test_packed_stage_is_smaller_than_the_plain_one_and_says_how_many_bits(start, data):
    end = data.draw(st.integers(start + 1, NUM_BLOCKS))
    place = {"num_stages": 3, "stage_index": 1}
    bills = [
        bill(WIDE, job(WIDE, packing=Packing(scheme=scheme)), start, end, **place) for scheme in ("none", "int8", "nf4")
    ]

    held = [items["weights"] + items.get("packed weights", 0) for items in bills]

    assert held == sorted(held, reverse=True) and len(set(held)) == 3


def test_packed_loading_peak_counts_the_matrix_that_is_read():
    table = llama(1, hidden_size=4096, intermediate_size=16384, vocab_size=100)
    shape = job(table, packing=Packing(scheme="nf4"), micro_batch_rows=1, row_tokens=4, label_tokens=1)

    items = bill(table, shape)

    running = sum(size for name, size in items.items() if name != "loading peak")
    largest_bytes = 4 * 4096 * 16384
    assert running + items["loading peak"] >= items["weights"] + items["packed weights"] + largest_bytes


def test_check_scheme_names_the_layer_and_a_scheme_that_holds_it():
    with pytest.raises(QuantizationError, match=r"int4 cannot hold mlp.down_proj of block 0, 64 x 176: .* choose int8"):
        check_scheme(llama(2), "int4")
    with pytest.raises(QuantizationError, match="nf4 cannot hold the 8 experts of llama"):
        check_scheme(WIDE.model_copy(update={"expert_blocks": (1,), "num_experts": 8}), "nf4")
    with pytest.raises(QuantizationError, match="needs a GPTQ checkpoint"):
        check_scheme(WIDE, "gptq")
    packed = WIDE.model_copy(update={"gptq": GptqFormat(bits=4, group_size=128, desc_act=False, zero_offset=1)})
    with pytest.raises(QuantizationError, match=r"set model\.quantization: gptq"):
        check_scheme(packed, "nf4")


def budget_for(scheme, table):
    """A device that holds the job in one scheme, but not in any that loses less."""
    items = bill(table, job(table, packing=Packing(scheme=scheme), checkpointing="on"), checkpointing=True)
    return device("only", available_mib=300 + sum(items.values()) // 2**20 + 1)


BIG = llama(NUM_BLOCKS, hidden_size=2048, intermediate_size=4096, vocab_size=100)


@pytest.mark.parametrize("scheme", ["none", "int8", "nf4"])
def test_choose_scheme_takes_the_least_lossy_that_fits_and_says_so(scheme):
    shape = job(BIG, checkpointing="on")
    only = budget_for(scheme, BIG)

    chosen, why = choose_scheme(BIG, shape, [only], LinkTable(), is_micro_batch_free=False)

    assert chosen == scheme
    assert ("does not fit" in why) == (scheme != "none")


def test_choose_scheme_leaves_out_what_cannot_hold_the_model():
    experts = BIG.model_copy(update={"expert_blocks": (1,), "num_experts": 8})

    chosen, why = choose_scheme(
        experts, job(experts), [device("tiny", available_mib=310)], LinkTable(), is_micro_batch_free=True
    )

    assert chosen == "none"
    assert "int8 cannot hold this model" in why


def test_choose_scheme_where_nothing_fits_gives_the_smallest_for_the_refusal():
    chosen, why = choose_scheme(
        BIG, job(BIG), [device("tiny", available_mib=310)], LinkTable(), is_micro_batch_free=True
    )

    assert chosen == "nf4"
    assert "nothing fits" in why


def test_plan_prints_scheme_reason_and_the_share_left_unpacked():
    shape = job(WIDE, packing=Packing(scheme="nf4", head="int8"))
    plan = search(WIDE, shape, [device("a")]).model_copy(
        update={"packing": shape.packing, "packing_why": "as the job asks", "unpacked_share": 0.0312}
    )

    text = explain(plan)

    assert "weights nf4, head in int8, 3.1% of them left unpacked; as the job asks" in text
    assert "packed weights" in text


def test_plan_says_why_auto_left_weights_unquantised_and_nothing_where_nobody_asked():
    plan = search(WIDE, job(WIDE), [device("a")])

    assert "weights" not in explain(plan).splitlines()[1]
    chosen = plan.model_copy(update={"packing_why": "it fits without any"})
    assert explain(chosen).splitlines()[1] == "weights unquantised; it fits without any"


def test_integer_products_need_room_for_rounded_activations_and_their_sums_and_unpack_no_weight():
    shape = job(WIDE, packing=Packing(scheme="int8", products="integer"), micro_batch_rows=3, row_tokens=50)

    found = WeightSizes(WIDE, shape).workspace_bytes(is_last=False)

    widest = max(one.in_features + 4 * one.out_features for one in WIDE.block_linears[0])
    assert found == 3 * 50 * widest + UNPACK_SCRATCH_BYTES


def test_card_holds_no_messages_and_no_snapshot():
    on_card = bill(WIDE, job(WIDE, is_on_cards=True), 0, 2, num_stages=2)
    on_host = bill(WIDE, job(WIDE), 0, 2, num_stages=2)

    assert on_host.keys() - on_card.keys() == {"wire queues", "shadow snapshot"}
    # What is freed on the host's heap is not given back as it is on a card.
    assert on_card["allocator"] < on_host["allocator"]
    assert all(on_card[name] == on_host[name] for name in on_card if name not in ("loading peak", "allocator"))
