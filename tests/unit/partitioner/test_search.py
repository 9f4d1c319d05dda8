from __future__ import annotations

from itertools import combinations, pairwise, permutations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from partitioner.cost import stage_cost
from partitioner.device import BlockTimings, LinkProfile, LinkTable, MeasuredLink
from partitioner.fitting import fits
from partitioner.memory import stage_memory
from partitioner.micro_batch import scaled_devices, with_rows
from partitioner.orders import all_layouts
from partitioner.plan import Plan
from partitioner.pricing import Pricer
from partitioner.replay import pipeline_step_time
from partitioner.search import choose_micro_batch, search
from plutino.errors import InfeasiblePlanError
from plutino.sizes import MIB
from tests.unit.partitioner.drawn_fleets import LINKS, fleets
from tests.unit.partitioner.fleet import SLOW_LAN, TIGHT, device, job, llama, tight_device


def exhaustive_search(table, shape, devices, links, *, checkpointing):
    """Least predicted step over every order of every subset and every cut; None if nothing fits."""
    best_s = None
    for num_stages in range(1, min(len(devices), table.num_blocks) + 1):
        for order in permutations(devices, num_stages):
            for inner in combinations(range(1, table.num_blocks), num_stages - 1):
                cuts = list(pairwise((0, *inner, table.num_blocks)))
                place = {"num_stages": num_stages, "checkpointing": checkpointing}
                peaks = [
                    order[k].baseline_bytes
                    + sum(
                        item.bytes
                        for item in stage_memory(table, shape, start_block=a, end_block=b, stage_index=k, **place)
                    )
                    for k, (a, b) in enumerate(cuts)
                ]
                if any(peak > held.available_bytes for peak, held in zip(peaks, order, strict=True)):
                    continue
                costs = [
                    stage_cost(
                        table,
                        shape,
                        order[k],
                        start_block=a,
                        end_block=b,
                        checkpointing=checkpointing,
                        link=links.between(order[k], order[k + 1]) if k + 1 < num_stages else None,
                    )
                    for k, (a, b) in enumerate(cuts)
                ]
                step_s = pipeline_step_time(costs, shape.num_micro_batches).step_s
                best_s = step_s if best_s is None else min(best_s, step_s)
    return best_s


@settings(max_examples=20, deadline=None)
@given(fleets(3), LINKS, st.integers(1, 6), st.sampled_from([1, 2, 8]), st.sampled_from(["on", "off"]))
def test_search_small_case_equals_the_exhaustive_oracle(devices, links, num_blocks, rows, checkpointing):
    table = llama(num_blocks)
    shape = job(table, micro_batch_rows=rows, checkpointing=checkpointing)
    expected_s = exhaustive_search(table, shape, devices, links, checkpointing=checkpointing == "on")

    try:
        found_s = search(table, shape, devices, links).step_s
    except InfeasiblePlanError:
        found_s = None

    assert found_s == (None if expected_s is None else pytest.approx(expected_s))


@settings(max_examples=20, deadline=None)
@given(fleets(4), LINKS, st.integers(1, 12), st.sampled_from(["fp32", "bf16"]))
def test_search_plan_never_over_budget_and_every_block_exactly_once(devices, links, num_blocks, dtype):
    table = llama(num_blocks)
    try:
        plan = search(table, job(table, dtype=dtype), devices, links)
    except InfeasiblePlanError:
        assert not fits(table, job(table, dtype=dtype), devices, links)
        return

    assert [block for s in plan.stages for block in range(s.start_block, s.end_block)] == list(range(num_blocks))
    assert all(stage.peak_bytes <= stage.budget_bytes for stage in plan.stages)
    assert all(stage.job_bytes == sum(item.bytes for item in stage.memory) for stage in plan.stages)
    assert len(set(plan.agent_ids)) == len(plan.stages)


def test_search_leaves_out_a_device_that_would_only_slow_the_rest():
    table = llama(4)
    devices = [device("fast", speed=2), device("snail", speed=0.01)]

    plan = search(table, job(table), devices)

    assert [stage.device_names for stage in plan.stages] == [("fast",)]
    assert [(unused.what, "less than" in unused.why) for unused in plan.unused_devices] == [("snail", True)]


def test_search_slow_link_keeps_the_job_on_one_device():
    table = llama(4)
    devices = [device("a"), device("b")]

    assert len(search(table, job(table), devices).stages) == 2
    slow = LinkTable(other=LinkProfile(bandwidth_bytes_per_s=1e4, latency_s=0.1))
    assert len(search(table, job(table), devices, slow).stages) == 1


def test_search_order_follows_the_fast_links():
    table = llama(6)
    devices = [device(name) for name in "abc"]
    fast = LinkProfile(bandwidth_bytes_per_s=1e9, latency_s=1e-4)
    measured = tuple(MeasuredLink(agent_ids=pair, link=fast) for pair in (("id-b", "id-a"), ("id-a", "id-c")))
    links = LinkTable(measured=measured, other=LinkProfile(bandwidth_bytes_per_s=2e5))

    plan = search(table, job(table, exact_stages=3), devices, links)

    assert plan.stages[1].device_names == ("a",)


def test_search_gives_the_faster_device_more_blocks():
    table = llama(9)
    devices = [device("slow"), device("fast", speed=2)]

    plan = search(table, job(table, batch_rows=32), devices)

    num_blocks = {stage.device_names[0]: stage.end_block - stage.start_block for stage in plan.stages}
    assert num_blocks["fast"] > num_blocks["slow"] > 0


def test_search_checkpointing_auto_turns_on_only_where_budgets_need_it():
    table = llama(4)
    shape = job(table, row_tokens=256)

    roomy, tight = (search(table, shape, [d]) for d in (device("d"), tight_device(table, shape, checkpointing=True)))

    assert (roomy.checkpointing, tight.checkpointing) == (False, True)
    assert tight.step_s > roomy.step_s


def test_search_exact_stages_is_obeyed_where_fewer_would_be_faster():
    table = llama(4)

    plan = search(table, job(table, exact_stages=2), [device("a", speed=50), device("b")], SLOW_LAN)

    assert len(plan.stages) == 2


def test_search_device_without_the_dtype_is_left_out_with_that_reason():
    table = llama(4)
    devices = [device("old", dtypes=("fp32",)), device("new")]

    plan = search(table, job(table, dtype="bf16"), devices)

    assert plan.agent_ids == ("id-new",)
    assert plan.unused_devices[0].why == "does not run bf16, only fp32"


def test_search_many_devices_says_that_not_every_layout_was_tried():
    table = llama(12)

    plan = search(table, job(table, batch_rows=16), [device(f"d{i}", speed=1 + i) for i in range(9)])

    assert plan.bound_s is None
    assert any("too many to try all" in rejected.why for rejected in plan.rejected)


def test_search_plan_survives_the_process_border():
    table = llama(4)

    plan = search(table, job(table), [device("a"), device("b")])

    assert Plan.model_validate_json(plan.model_dump_json()) == plan


def test_search_same_inputs_give_the_same_plan():
    table = llama(8)
    devices = [device(f"d{i}", speed=1 + i / 3) for i in range(4)]

    assert search(table, job(table), devices, SLOW_LAN) == search(table, job(table), devices, SLOW_LAN)


def test_choose_micro_batch_takes_the_fastest_that_fits():
    table = llama(6)
    devices = [device(name) for name in "ab"]
    shape = job(table, batch_rows=12, micro_batch_rows=2)

    plan = choose_micro_batch(table, shape, devices)

    steps_s = {
        rows: search(table, with_rows(shape, rows), scaled_devices(devices, 2, rows)).step_s
        for rows in (1, 2, 3, 4, 6, 12)
    }
    assert plan.step_s == min(steps_s.values()) == steps_s[plan.micro_batch_rows]


def test_choose_micro_batch_smaller_where_memory_asks_for_it():
    table = llama(4)
    shape = job(table, **TIGHT)

    plan = choose_micro_batch(table, shape, [device("a", available_mib=380)])

    assert plan.micro_batch_rows < 16
    assert any(r.what == "micro-batches of 16 rows" and r.why == "fit no budget" for r in plan.rejected)


def test_choose_micro_batch_refusal_is_that_of_the_smallest():
    table = llama(4)

    with pytest.raises(InfeasiblePlanError, match="does not fit"):
        choose_micro_batch(table, job(table, **TIGHT), [device("a", available_mib=310)])


def test_scaled_timings_keep_a_fixed_share():
    (small,) = scaled_devices([device("a")], 8, 1)

    timings = device("a").timings
    assert timings.forward_s / 8 < small.timings.forward_s < timings.forward_s
    assert scaled_devices([device("a")], 8, 8) == [device("a")]


MEASURED_TWICE = {
    "forward_s": 0.010,
    "backward_s": 0.016,
    "recomputed_backward_s": 0.024,
    "embedding_s": 0.001,
    "head_forward_s": 0.040,
    "head_backward_s": 0.030,
    "mapped_forward_s": 0.020,
    "mapped_backward_s": 0.020,
    "mapped_recomputed_backward_s": 0.048,
    "one_row_forward_s": 0.004,
    "one_row_backward_s": 0.004,
    "head_one_row_forward_s": 0.037,
    "head_one_row_backward_s": 0.033,
}
"""With one row and with four; the head's backward pass came out the other way round."""


def measured_twice(rows: int) -> BlockTimings:
    measured = device("a").model_copy(update={"timings": BlockTimings(**MEASURED_TWICE)})
    (found,) = scaled_devices([measured], 4, rows)
    return found.timings


def test_seconds_measured_with_one_row_too_lie_on_the_line_between():
    assert measured_twice(4) == BlockTimings(**MEASURED_TWICE)
    one, two = measured_twice(1), measured_twice(2)
    assert (one.forward_s, one.backward_s) == pytest.approx((0.004, 0.004))
    assert (two.forward_s, two.backward_s) == pytest.approx((0.006, 0.008))
    assert (two.head_forward_s, two.head_backward_s) == pytest.approx((0.038, 0.030))
    assert two.embedding_s == pytest.approx(0.0005)
    assert two.one_row_s == one.one_row_s == BlockTimings(**MEASURED_TWICE).one_row_s


def test_seconds_measured_with_one_number_of_rows_grow_as_what_they_are_a_kind_of():
    two = measured_twice(2)

    assert two.mapped_forward_s == pytest.approx(0.020 * 0.6)
    assert two.mapped_backward_s == pytest.approx(0.020 * 0.5)
    recomputed = (two.recomputed_backward_s, two.mapped_recomputed_backward_s)
    assert recomputed == pytest.approx((0.024 * 14 / 26, 0.048 * 14 / 26))


def test_seconds_beyond_the_measured_rows_lie_between_the_line_and_what_grows_with_the_rows():
    sixteen = measured_twice(16)

    assert sixteen.head_forward_s == pytest.approx((0.052 * 0.160) ** 0.5)
    # It took no longer with four rows than with one.
    assert sixteen.head_backward_s == pytest.approx((0.030 * 0.120) ** 0.5)


def test_same_host_devices_use_the_loopback_link():
    links = LinkTable(other=LinkProfile(bandwidth_bytes_per_s=1.0))

    assert links.between(device("a", host="h"), device("b", host="h")) == links.same_host
    assert links.between(device("a"), device("b")).bandwidth_bytes_per_s == 1.0
    assert device("a").available_bytes == 4000 * MIB


@settings(max_examples=10, deadline=None)
@given(fleets(3), LINKS, st.sampled_from([2, 8]), st.data())
def test_search_is_never_slower_with_more_memory_speed_or_bandwidth_and_knows_no_names(devices, links, rows, data):
    table = llama(5)
    shape = job(table, micro_batch_rows=rows)
    try:
        before_s = search(table, shape, devices, links, allow_replicas=True).step_s
    except InfeasiblePlanError:
        return
    chosen = data.draw(st.integers(0, len(devices) - 1))
    timings = devices[chosen].timings
    quicker = timings.times(0.5)
    bettered = {
        "memory": ({"available_bytes": devices[chosen].available_bytes + 64 * MIB}, links),
        "speed": ({"timings": quicker}, links),
        "bandwidth": ({}, LinkTable(other=links.other.model_copy(update={"bandwidth_bytes_per_s": 1e10}))),
    }
    for change, better_links in bettered.values():
        better = [d.model_copy(update=change if i == chosen else {}) for i, d in enumerate(devices)]
        assert search(table, shape, better, better_links, allow_replicas=True).step_s <= before_s * (1 + 1e-9)
    renamed = [d.model_copy(update={"agent_id": f"x{i}", "name": f"x{i}", "host_id": f"x{i}"}) for i, d in
               enumerate(reversed(devices))]  # fmt: skip
    assert search(table, shape, renamed, links, allow_replicas=True).step_s == pytest.approx(before_s)


@settings(max_examples=10, deadline=None)
@given(fleets(3), LINKS, st.integers(1, 4), st.sampled_from([1, 4]))
def test_search_with_replicas_equals_the_exhaustive_optimum(devices, links, num_blocks, rows):
    table = llama(num_blocks)
    shape = job(table, micro_batch_rows=rows)
    pricer = Pricer(table, shape, devices, links)
    steps_s = [
        float(pricer.step_seconds(layout, [(0, *inner, num_blocks)])[0])
        for layout in all_layouts(devices, links, max_stages=min(len(devices), num_blocks), allow_replicas=True)
        for inner in combinations(range(1, num_blocks), len(layout) - 1)
    ]
    if min(steps_s) == float("inf"):
        assert not fits(table, shape, devices)
        return

    plan = search(table, shape, devices, links, allow_replicas=True)

    assert plan.step_s == pytest.approx(min(steps_s))
    assert all(replica.peak_bytes <= replica.budget_bytes for stage in plan.stages for replica in stage.replicas)
    assert plan.bound_s == pytest.approx(plan.step_s)


def test_search_replicas_where_one_stage_each_is_slower_than_sharing_the_batch():
    table = llama(2)
    devices = [device(name, speed=speed) for name, speed in (("a", 1), ("b", 2), ("c", 1))]

    alone, shared = (
        search(table, job(table, micro_batch_rows=1), devices, allow_replicas=choice) for choice in (False, True)
    )

    assert all(len(stage.agent_ids) == 1 for stage in alone.stages)
    assert shared.step_s < alone.step_s
    (owners,) = [o for o, stage in zip(shared.micro_batch_owners, shared.stages, strict=True) if stage.further_replicas]
    fastest = next(s for s in shared.stages if s.further_replicas).device_names.index("b")
    assert owners.count(fastest) == max(owners.count(r) for r in set(owners))


def test_search_checkpoints_only_the_stages_that_need_it():
    table = llama(8)
    shape = job(table, row_tokens=256)
    items = stage_memory(table, shape, start_block=4, end_block=8, num_stages=2, stage_index=1, checkpointing=True)
    tight = device("tight", available_mib=300 + sum(item.bytes for item in items) // MIB + 2)

    plan = search(table, job(table, row_tokens=256, exact_stages=2), [device("roomy", speed=1), tight])

    by_device = {stage.device_names[0]: stage.checkpointing for stage in plan.stages}
    assert by_device["roomy"] is False and plan.checkpointing == any(by_device.values())


def test_search_devices_on_the_same_cores_are_no_replicas_of_each_other():
    table = llama(2)
    shape = job(table, micro_batch_rows=1, exact_stages=1)
    own = [device(name, speed=1) for name in "abcd"]
    shared = [one.model_copy(update={"cores_id": cores}) for one, cores in zip(own, ("x", "x", "y", "y"), strict=True)]

    (everybody,), (apart,) = (search(table, shape, devices, allow_replicas=True).stages for devices in (own, shared))

    assert len(everybody.agent_ids) == 4
    assert len(apart.agent_ids) == 2 and set(apart.device_names) & {"a", "b"} and set(apart.device_names) & {"c", "d"}


def test_search_only_a_device_with_malloc_keeps_its_heap():
    table = llama(2)
    roomy = device("a", available_mib=4000)
    card = roomy.model_copy(update={"is_card": True})

    (on_cpu,), (on_card,) = (search(table, job(table), [one]).stages for one in (roomy, card))

    assert on_cpu.keeps_heap and not on_card.keeps_heap
    assert "heap reuse" not in {item.name for item in on_card.memory}


def test_search_prices_blocks_as_malloc_will_serve_them_in_the_budget():
    table = llama(4)
    shape = job(table, row_tokens=512, batch_rows=8, micro_batch_rows=8)
    kept = device("d", available_mib=4000)
    mapped_s = {"mapped_forward_s": 0.013, "mapped_backward_s": 0.029}
    roomy = kept.model_copy(update={"timings": kept.timings.model_copy(update=mapped_s)})
    (in_room,) = search(table, shape, [roomy]).stages
    least_bytes = next(item.bytes for item in in_room.memory if item.name == "heap reuse")
    tight = roomy.model_copy(update={"available_bytes": in_room.peak_bytes - least_bytes})

    (in_little,) = search(table, shape, [tight]).stages

    assert in_room.keeps_heap and not in_little.keeps_heap
    assert not in_little.checkpointing
    (as_kept,) = search(table, shape, [kept]).stages
    assert (in_room.forward_s, in_room.backward_s) == (as_kept.forward_s, as_kept.backward_s)
    assert in_little.forward_s == pytest.approx(in_room.forward_s + 4 * 0.003)
    assert in_little.backward_s == pytest.approx(in_room.backward_s + 4 * 0.007)


def test_small_tensors_take_the_same_seconds_in_every_budget():
    table = llama(4)
    shape = job(table)
    one = device("d")
    slow = one.model_copy(update={"timings": one.timings.model_copy(update={"mapped_forward_s": 1.0})})

    assert search(table, shape, [slow]).step_s == search(table, shape, [one]).step_s
