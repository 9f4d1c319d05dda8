from __future__ import annotations

import pytest

from partitioner.cost import StageCost, message_bytes, stage_cost
from partitioner.device import LinkProfile
from partitioner.replay import pipeline_step_time
from plutino.job.method import LoraConfig
from tests.unit.partitioner.fleet import device, job, llama


def stage(forward_s=1.0, backward_s=2.0, busy_s=0.0, latency_s=0.0):
    return StageCost(forward_s=forward_s, backward_s=backward_s, link_busy_s=busy_s, link_latency_s=latency_s)


@pytest.mark.parametrize(("num_stages", "num_micro_batches"), [(1, 1), (1, 5), (2, 1), (3, 3), (4, 8), (5, 2)])
def test_step_time_of_equal_stages_is_the_textbook_formula(num_stages, num_micro_batches):
    time = pipeline_step_time([stage()] * num_stages, num_micro_batches)

    assert time.step_s == pytest.approx((num_micro_batches + num_stages - 1) * 3.0)
    assert time.bubble_share == pytest.approx((num_stages - 1) / (num_micro_batches + num_stages - 1))


@pytest.mark.parametrize("slow", [0, 1, 2])
def test_step_time_dominant_stage_binds_wherever_it_stands(slow):
    stages = [stage(10.0, 20.0) if k == slow else stage(0.1, 0.2) for k in range(3)]

    assert pipeline_step_time(stages, 20).step_s == pytest.approx(20 * 30.0, rel=0.01)


def test_step_time_one_micro_batch_pays_every_link_both_ways():
    stages = [stage(busy_s=0.5, latency_s=0.25), stage(busy_s=0.5, latency_s=0.25), stage()]

    assert pipeline_step_time(stages, 1).step_s == pytest.approx(3 * 3.0 + 4 * 0.75)


def test_step_time_slow_link_carries_one_message_at_a_time():
    stages = [stage(0.1, 0.1, busy_s=5.0), stage(0.1, 0.1)]

    assert pipeline_step_time(stages, 8).step_s > 8 * 5.0


def test_step_time_stage_below_the_adapters_never_waits_for_gradients():
    frozen = StageCost(1.0, 0.0, has_backward=False, gets_gradient=False)
    trained = stage(0.5, 0.5)

    assert pipeline_step_time([frozen, trained], 10).step_s == pytest.approx(10 * 1.0 + 1.0)


def cost_of(table, shape, start, end, *, checkpointing=False, link=None):
    return stage_cost(
        table, shape, device("d"), start_block=start, end_block=end, checkpointing=checkpointing, link=link
    )


def test_stage_cost_first_has_the_embedding_and_last_the_head():
    table = llama(4)
    shape = job(table)

    first, middle, last = (cost_of(table, shape, *blocks) for blocks in ((0, 1), (1, 2), (3, 4)))

    assert first.forward_s == pytest.approx(0.010 + 0.001)
    assert (middle.forward_s, middle.backward_s) == pytest.approx((0.010, 0.022))
    assert (last.forward_s, last.backward_s) == pytest.approx((0.010 + 0.004, 0.022 + 0.007))


def test_stage_cost_checkpointing_that_was_not_measured_adds_one_forward_to_each_backward():
    table = llama(4)

    off, on = (cost_of(table, job(table), 1, 3, checkpointing=choice) for choice in (False, True))

    assert on.backward_s - off.backward_s == pytest.approx(off.forward_s)


def test_stage_cost_checkpointing_costs_what_was_measured():
    table = llama(4)
    plain = device("d")
    measured = plain.timings.model_copy(update={"recomputed_backward_s": 0.036})
    known = plain.model_copy(update={"timings": measured})

    cost = stage_cost(table, job(table), known, start_block=1, end_block=3, checkpointing=True, link=None)

    assert cost.backward_s == pytest.approx(2 * 0.036)


def test_timings_with_and_without_recomputation_compare_and_scale_part_by_part():
    plain = device("d").timings
    known = plain.model_copy(update={"forward_s": 1.0, "recomputed_backward_s": 0.036})

    assert plain.fastest(known) == known.fastest(plain) == plain.model_copy(update={"recomputed_backward_s": 0.036})
    assert known.times(2.0).recomputed_backward_s == pytest.approx(0.072)
    assert plain.times(2.0).recomputed_backward_s is None
    # Of short passes the recomputed one may come out as the shorter; recomputing never saves time.
    assert plain.model_copy(update={"recomputed_backward_s": 0.001}).block.recompute_s == 0.0


def test_stage_cost_blocks_below_the_lowest_adapter_have_no_backward():
    table = llama(4)
    shape = job(table, LoraConfig(blocks=(2,)))

    below, across = (cost_of(table, shape, *blocks, link=LinkProfile()) for blocks in ((0, 2), (1, 4)))

    assert (below.backward_s, below.has_backward, below.gets_gradient) == (0.0, False, False)
    assert across.backward_s == pytest.approx(2 * 0.022 + 0.007)


def test_message_bytes_codec_bf16_halves_fp32_and_leaves_bf16():
    table = llama(1)
    raw_bytes = 2 * 64 * table.hidden_size * 4

    assert message_bytes(table, job(table)) == raw_bytes
    assert message_bytes(table, job(table, codec="bf16")) == raw_bytes // 2
    assert message_bytes(table, job(table, codec="bf16", dtype="bf16")) == raw_bytes // 2
