from __future__ import annotations

from itertools import combinations, pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from partitioner.block_operations import block_operations, decoder_block_operations
from partitioner.block_seconds import blocks_s, by_block, mean_block
from partitioner.bounds import Bounds
from partitioner.cached_epoch import side_device
from partitioner.cached_stages import cuts_by_speed, part_of
from partitioner.cost import SIDE_FORWARD_SHARE, stage_cost
from partitioner.device import BlockTimings, LinkProfile, LinkTable
from partitioner.estimate import Estimator
from partitioner.fleet_file import FleetFile
from partitioner.micro_batch import scaled_devices
from partitioner.orders import all_layouts, fastest_first
from partitioner.pricing import Pricer
from partitioner.search import search
from plutino.job.method import LoraConfig, ParallelAdaptersConfig
from tests.unit.partitioner.fleet import device, job, llama, t5

FREE = LinkTable(
    same_host=LinkProfile(bandwidth_bytes_per_s=1e15, latency_s=0.0),
    other=LinkProfile(bandwidth_bytes_per_s=1e15, latency_s=0.0),
)
# A block of the encoder takes 0.032 s there and back, one of the decoder a sixth.
HALVES = {"decoder_forward_s": 0.010 / 6, "decoder_backward_s": 0.022 / 6}


def halved(name, *, speed=1.0, decoder=None, **changes):
    """A device that has measured a block of either half."""
    plain = device(name, speed=speed, **changes)
    own = {field: seconds / speed for field, seconds in (decoder or HALVES).items()}
    return plain.model_copy(update={"timings": plain.timings.model_copy(update=own)})


def seconds_of(table, shape, one, start, end, *, checkpointing=False):
    return stage_cost(table, shape, one, start_block=start, end_block=end, checkpointing=checkpointing, link=None)


def test_stage_takes_the_seconds_of_each_half_for_its_own_blocks():
    table, one = t5(12), halved("d")

    encoder, across, decoder = (seconds_of(table, job(table), one, *blocks) for blocks in ((1, 5), (4, 8), (7, 11)))

    assert (encoder.forward_s, encoder.backward_s) == pytest.approx((4 * 0.010, 4 * 0.022))
    assert (decoder.forward_s, decoder.backward_s) == pytest.approx((4 * 0.010 / 6, 4 * 0.022 / 6))
    assert across.forward_s == pytest.approx(2 * 0.010 + 2 * 0.010 / 6)


def test_recomputing_and_mapped_tensors_cost_each_half_what_it_was_measured_to():
    table = t5(12)
    more = {"recomputed_backward_s": 0.030, "decoder_recomputed_backward_s": 0.005}
    mapped = {f"mapped_{name}": 2 * s for name, s in (HALVES | more).items()}
    one = halved("d", decoder=HALVES | more | mapped)

    assert seconds_of(table, job(table), one, 5, 8, checkpointing=True).backward_s == pytest.approx(0.030 + 2 * 0.005)
    slow = one.timings.mapped
    assert (slow.decoder_forward_s, slow.decoder_block.recompute_s) == pytest.approx((2 * 0.010 / 6, 0.01 - 0.022 / 3))
    assert slow.forward_s == one.timings.forward_s, "of the encoder's forward pass nothing else was measured"
    unmeasured = halved("d").timings.decoder_block
    assert unmeasured.recompute_s == unmeasured.forward_s


def test_blocks_below_the_lowest_trained_one_of_the_decoder_have_no_backward_pass():
    table = t5(12)
    shape = job(table, LoraConfig(blocks=(8,)), frozen_share=0.5)

    cost = seconds_of(table, shape, halved("d"), 5, 11)

    assert cost.backward_s == pytest.approx(3 * 0.022 / 6)
    assert cost.forward_s == pytest.approx(0.5 * 0.010 + 0.5 * 2 * 0.010 / 6 + 3 * 0.010 / 6)


def test_model_without_halves_is_priced_to_the_last_bit_as_blocks_times_seconds():
    table, plain = llama(23), device("d", speed=0.7)
    shape = job(table, LoraConfig(blocks=(9, 20)), frozen_share=1 / 3)
    starts, ends = np.meshgrid(np.arange(24), np.arange(24), indexing="ij")

    forward_s, backward_s = blocks_s(table, shape, plain.timings, starts, ends, checkpointing=True)

    timings = plain.timings
    for start, end in ((1, 5), (3, 17), (9, 22), (12, 20)):
        num_trained = end - max(start, min(9, end))
        num_run = num_trained + shape.frozen_share * (end - start - num_trained)
        assert blocks_s(table, shape, timings, start, end, checkpointing=True) == (
            num_run * timings.forward_s,
            num_trained * (timings.backward_s + timings.forward_s),
        )
        assert (forward_s[start, end], backward_s[start, end]) == blocks_s(
            table, shape, timings, start, end, checkpointing=True
        )
    assert mean_block(table, timings) == timings.block
    # What a decoder's block of another model took is nothing to a model that has no encoder.
    assert mean_block(table, halved("d").timings).forward_s == 0.010
    assert (by_block(table, 1.0, 9.0) == 1.0).all()


def test_timings_of_both_halves_scale_and_compare_part_by_part():
    timings = halved("d").timings

    assert timings.times(3.0).decoder_backward_s == pytest.approx(3 * 0.022 / 6)
    slower = timings.model_copy(update={"forward_s": 1.0, "decoder_forward_s": 0.001})
    assert timings.fastest(slower) == timings.model_copy(update={"decoder_forward_s": 0.001})
    assert BlockTimings.model_validate_json(timings.model_dump_json()) == timings
    (small,) = scaled_devices([halved("d")], 8, 1)
    # Of a short pass half at most is what every pass costs, however few its rows.
    assert small.timings.decoder_forward_s == pytest.approx(0.010 / 6 * (0.5 + 0.5 / 8))
    with pytest.raises(ValueError, match="both decoder_forward_s and decoder_backward_s"):
        BlockTimings(**(device("d").timings.known_s | {"decoder_forward_s": 1.0}))


def test_mean_block_weighs_halves_of_unequal_length():
    table = t5(12).model_copy(update={"num_encoder_blocks": 3})

    assert mean_block(table, halved("d").timings).both_ways_s == pytest.approx(0.032 * (3 + 9 / 6) / 12)


def test_fastest_replica_is_the_one_that_is_quickest_with_a_block_of_either_half():
    devices = [halved("a", decoder={"decoder_forward_s": 0.2, "decoder_backward_s": 0.2}), halved("b", speed=0.9)]

    assert fastest_first((0, 1), devices) == (1, 0)


@pytest.mark.parametrize("num_stages", [2, 4])
def test_search_balances_the_seconds_of_an_encoder_decoder_and_not_its_blocks(num_stages):
    table = t5(24)
    shape = job(table, batch_rows=16, exact_stages=num_stages)
    names = "abcd"[:num_stages]

    plan, alike = (search(table, shape, [make(name) for name in names], FREE) for make in (halved, device))

    layout = tuple((i,) for i in range(num_stages))
    every = [(0, *inner, 24) for inner in combinations(range(1, 24), num_stages - 1)]
    found_s = Pricer(table, shape, [halved(name) for name in names], FREE).step_seconds(layout, every)
    assert plan.step_s == pytest.approx(float(found_s.min()))
    busy_s = [stage.forward_s + stage.backward_s for stage in plan.stages]
    # No stage is more than an encoder's block above the mean.
    assert max(busy_s) < sum(busy_s) / num_stages + 0.032
    counts = [stage.end_block - stage.start_block for stage in plan.stages]
    assert counts[-1] > 2 * counts[0]
    assert max(stage.end_block - stage.start_block for stage in alike.stages) <= 24 // num_stages + 1


def test_guess_deals_out_work_and_only_where_memory_has_room_for_the_blocks():
    table = t5(24)
    shape = job(table, batch_rows=16, checkpointing="off")
    devices = [halved(name) for name in "ab"]
    (guess,) = Estimator(Pricer(table, shape, devices, FREE)).guesses([((0,), (1,))])
    (plain,) = Estimator(Pricer(table, shape, [device(name) for name in "ab"], FREE)).guesses([((0,), (1,))])

    assert plain.cuts == (0, 12, 24)
    assert guess.cuts[1] in (6, 7, 8)
    found = Pricer(table, shape, devices, FREE).candidate(((0,), (1,)), guess.cuts)
    assert guess.step_s == pytest.approx(found.step_s, rel=0.1)
    # The second device has room for half the blocks and a few more: it cannot take what its speed would give it.
    pricer = Pricer(table, shape, devices, FREE)
    place = pricer.places(((0,), (1,)))[1].places[0]
    roomy = pricer.row(place, checkpointing=False, start=10)[-1] + devices[1].baseline_bytes
    tight = devices[1].model_copy(update={"available_bytes": int(roomy)})
    (held,) = Estimator(Pricer(table, shape, [devices[0], tight], FREE)).guesses([((0,), (1,))])
    assert held.cuts[1] >= 10


@settings(max_examples=30, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from([0.3, 1.0]), st.floats(0.0005, 0.05), st.floats(0.0005, 0.05), st.booleans()),
        min_size=1,
        max_size=3,
    ),
    st.integers(1, 6),
    st.sampled_from([None, (2,), (5, 6)]),
    st.sampled_from([2e5, 1e9]),
    st.data(),
)
def test_bound_with_halves_never_exceeds_the_replay_of_any_cuts(numbers, border, adapted, bandwidth, data):
    table = t5(8).model_copy(update={"num_encoder_blocks": border})
    shape = job(table, LoraConfig(blocks=adapted), checkpointing=data.draw(st.sampled_from(["on", "off", "auto"])))
    devices = [
        halved(
            f"d{i}",
            speed=speed,
            available_mib=data.draw(st.integers(306, 340)),
            decoder={"decoder_forward_s": forward_s, "decoder_backward_s": backward_s}
            | ({"recomputed_backward_s": 0.03, "decoder_recomputed_backward_s": backward_s} if recomputed else {}),
        )
        for i, (speed, forward_s, backward_s, recomputed) in enumerate(numbers)
    ]
    links = LinkTable(other=LinkProfile(bandwidth_bytes_per_s=bandwidth, latency_s=1e-3))
    pricer = Pricer(table, shape, devices, links)
    layouts = all_layouts(devices, links, max_stages=len(devices), allow_replicas=True)
    layout = data.draw(st.sampled_from(layouts))
    inner = data.draw(st.permutations(range(1, table.num_blocks)))[: len(layout) - 1]
    cuts = (0, *sorted(inner), table.num_blocks)
    candidate = pricer.candidate(layout, cuts)
    bounds = Bounds(pricer)

    if candidate is not None:
        assert bounds.step_bound_s(layout) <= candidate.step_s * (1 + 1e-9)
        for k, (start, end) in enumerate(pairwise(cuts)):
            terms, costs = bounds.terms(layout, k), candidate.groups[k].replicas
            assert terms.forward_s[start, end] == min(cost.forward_s for cost in costs)
            assert terms.backward_s[start, end] == min(cost.backward_s for cost in costs)


def side_job(table, **changes):
    method = ParallelAdaptersConfig(reduction=4)
    return job(table, method, batch_rows=16, cached_steps_share=2.0, entry_token_bytes=256, **changes)


def test_side_network_takes_the_backward_seconds_of_each_half_and_its_stages_add_up_to_the_whole():
    table, one = t5(12), halved("d")
    shape = side_job(table)
    whole = side_device(table, shape, one, 256, 1e6)
    head_s = one.timings.head_forward_s + one.timings.head_backward_s

    parts = [part_of(whole, table, shape, one.timings, *blocks) for blocks in ((0, 4), (4, 8), (8, 12))]

    pass_s = (1 + SIDE_FORWARD_SHARE) * 0.022
    assert [part.compute_s for part in parts] == pytest.approx(
        [4 * pass_s, (2 + 2 / 6) * pass_s, 4 / 6 * pass_s + head_s]
    )
    assert sum(part.compute_s for part in parts) == pytest.approx(whole.compute_s)
    # 64 tokens a row of the source are read beside the encoder, 20 of the target beside the decoder.
    assert sum(part.read_s for part in parts) == pytest.approx(whole.read_s)
    assert parts[0].read_s / parts[2].read_s == pytest.approx(64 / 20)


def test_side_part_of_a_model_without_halves_is_its_share_of_the_blocks_to_the_last_bit():
    table, one = llama(7), device("d", speed=0.3)
    shape = side_job(table)
    whole = side_device(table, shape, one, 256, 1e6)
    head_s = one.timings.head_forward_s + one.timings.head_backward_s

    part = part_of(whole, table, shape, one.timings, 2, 5)

    assert (part.compute_s, part.read_s) == (3 / 7 * (whole.compute_s - head_s), 3 / 7 * whole.read_s)


def test_guessed_borders_of_later_epochs_deal_out_the_side_networks_work():
    layout = ((0,), (1,))

    assert cuts_by_speed(layout, [1.0, 1.0], [1.0] * 24) == (0, 12, 24)
    assert cuts_by_speed(layout, [1.0, 1.0], [6.0] * 12 + [1.0] * 12) == (0, 7, 24)
    pricer = Pricer(t5(24), side_job(t5(24), cached_ways=("stages",)), [halved(name) for name in "ab"], FREE)
    even, guessed = pricer.cached_step(layout, (0, 12, 24)), pricer.cached_step(layout)
    assert guessed.step_s == pricer.cached_step(layout, (0, 7, 24)).step_s < even.step_s


def test_sums_of_replicas_hide_behind_the_backward_seconds_of_their_own_half():
    table, slow = t5(12), LinkTable(other=LinkProfile(bandwidth_bytes_per_s=1e3))
    layout = ((0, 1), (2,))

    def sum_s(make, start, end):
        return Pricer(table, job(table), [make(name) for name in "abc"], slow).sum_s(layout, 0, start, end)

    assert sum_s(halved, 0, 6) == sum_s(device, 0, 6)
    # The topmost block's pass is over when its gradient is there.
    assert sum_s(halved, 6, 12) - sum_s(device, 6, 12) == pytest.approx(5 * 0.022 * 5 / 6)


@pytest.mark.parametrize("given", [{}, {"decoder_block_backward_s": 0.02}])
def test_fleet_file_gives_a_decoders_block_its_own_seconds(given):
    values = {"name": "d", "memory": "4GiB", "block_forward_s": 0.1, "decoder_block_forward_s": 0.01}
    table = t5(12)

    (found,) = FleetFile.model_validate({"devices": [values | given]}).profiles(table, job(table))
    (other,) = FleetFile.model_validate({"devices": [values | given]}).profiles(llama(4), job(llama(4)))

    assert found.timings.block.backward_s == pytest.approx(0.11)
    assert found.timings.decoder_forward_s == 0.01
    assert found.timings.decoder_backward_s == pytest.approx(given.get("decoder_block_backward_s", 0.011))
    assert other.timings.decoder_forward_s is None


def test_fleet_file_without_a_decoders_seconds_prices_all_blocks_alike():
    table = t5(12)
    fleet = FleetFile.model_validate({"devices": [{"name": "d", "memory": "4GiB", "block_forward_s": 0.1}]})

    (found,) = fleet.profiles(table, job(table))

    assert found.timings.decoder_block == found.timings.block


@pytest.mark.parametrize("decoder", [{"decoder_block_forward_s": 1.0}, {"decoder_block_backward_s": 1.0}])
def test_fleet_file_refuses_a_decoders_seconds_without_what_they_go_with(decoder):
    with pytest.raises(ValueError, match="goes with"):
        FleetFile.model_validate({"devices": [{"name": "d", "memory": "4GiB", "flops": 1e9} | decoder]})


def test_operations_of_a_decoder_follow_from_its_targets_and_the_keys_and_values_it_makes_of_sources():
    table = t5(12)
    shape = job(table, source_tokens=50, label_tokens=6)
    attention, mlp, norms = 4 * 64 * 64, 2 * 64 * 128, 64
    # Parameters that only a half's first or last block has are spread over the half.
    table_params = 32 * 4 + 64

    encoder_params = attention + mlp + 2 * norms + table_params / 6
    assert block_operations(table, shape) == pytest.approx(2 * 100 * encoder_params + 4 * 100 * 50 * 64)
    decoder_params = 1.5 * attention + mlp + 3 * norms + (table_params - 64) / 6
    assert decoder_block_operations(table, shape) == pytest.approx(
        2 * (6 * decoder_params + 100 * attention / 2) + 4 * 6 * 53 * 64
    )
    quick = FleetFile.model_validate({"devices": [{"name": "d", "memory": "4GiB", "flops": 1e9}]})
    (found,) = quick.profiles(table, shape)
    assert found.timings.decoder_forward_s == pytest.approx(decoder_block_operations(table, shape) / 1e9)
    assert found.timings.decoder_forward_s < found.timings.forward_s / 2
