from __future__ import annotations

import pytest

from partitioner.device import LinkProfile, LinkTable
from partitioner.explain import explain
from partitioner.kept_prefix import read_s
from partitioner.pricing import Pricer
from partitioner.search import search
from plutino.job.method import LoraConfig
from tests.unit.partitioner.fleet import device, job, llama, t5

ROW_TOKENS, TARGET_TOKENS, TOKEN_BYTES = 64, 20, 256


def prefix_job(table, place, **changes):
    values = {"cached_steps_share": 4.0, "frozen_share": 1 / 5, "entry_token_bytes": TOKEN_BYTES}
    values |= {"row_tokens": ROW_TOKENS, "label_tokens": 2 * TARGET_TOKENS, "micro_batch_rows": 2}
    return job(table, LoraConfig(blocks=tuple(range(place, table.num_blocks))), **(values | changes))


@pytest.mark.parametrize(
    ("table", "place", "row_tokens"),
    [
        (llama(6), 4, ROW_TOKENS),
        (t5(6), 2, ROW_TOKENS),
        (t5(6), 3, ROW_TOKENS + TARGET_TOKENS),
        (t5(6), 5, ROW_TOKENS + TARGET_TOKENS),
    ],
)
def test_entries_below_a_decoders_block_hold_both_texts_and_others_one(table, place, row_tokens):
    shape = prefix_job(table, place)

    upper = search(table, shape, [device("a")], LinkTable()).upper

    assert (upper.place, upper.row_bytes) == (place, row_tokens * TOKEN_BYTES)
    assert read_s(table, shape) == pytest.approx(2 * upper.row_bytes / 500e6)


@pytest.mark.parametrize("place", [2, 4])
def test_later_steps_of_an_encoder_decoder_carry_at_most_embeddings_of_targets_below_the_place(place):
    table, latency_s = t5(6), 2e-3
    shape = prefix_job(table, place, batch_rows=2)
    links = LinkTable(other=LinkProfile(bandwidth_bytes_per_s=1e6, latency_s=latency_s))
    pricer = Pricer(table, shape, [device("a"), device("b")], links)
    alone, below = (pricer.candidate(*found) for found in ((((0,),), (0, 6)), (((0,), (1,)), (0, place, 6))))

    more_s = pricer.upper_step(below).step_s - pricer.upper_step(alone).step_s

    # One micro-batch: nothing runs beside anything.
    target_bytes = 2 * TARGET_TOKENS * table.hidden_size * 4
    expected_s = target_bytes / 1e6 + latency_s if place < table.num_encoder_blocks else 0.0
    assert more_s == pytest.approx(expected_s, abs=1e-9)


def test_plan_says_that_the_encoders_output_is_kept_where_a_decoders_block_is_the_lowest_trained():
    table = t5(6)
    of_encoder, of_decoder = (
        explain(search(table, prefix_job(table, place), [device("a")], LinkTable())) for place in (2, 4)
    )

    assert "blocks 0 to 1 run in the first epoch alone\n" in of_encoder
    assert "blocks 0 to 3 run in the first epoch alone; kept are the encoder's output and what" in of_decoder
