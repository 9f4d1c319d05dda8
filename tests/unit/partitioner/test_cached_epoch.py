from __future__ import annotations

from itertools import combinations, pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from partitioner.cached_epoch import SideDevice, cached_step, side_device, side_worker_bytes
from partitioner.cached_stages import SideStage, cuts_by_speed, staged_step
from partitioner.device import LinkProfile, LinkTable
from partitioner.explain import explain
from partitioner.kept_prefix import read_s
from partitioner.orders import all_layouts
from partitioner.pricing import Pricer
from partitioner.search import search
from partitioner.sum_path import BUSY_S_PER_BYTE
from plutino.errors import InfeasiblePlanError
from plutino.job.method import LoraConfig, ParallelAdaptersConfig
from tests.unit.partitioner.fleet import device, job, llama

GIGABIT = 125e6


def sides(*seconds):
    return [SideDevice(agent_id=f"d{i}", compute_s=s, read_s=0.0) for i, s in enumerate(seconds)]


def even(number, bandwidth=GIGABIT):
    return [[bandwidth] * number for _ in range(number)]


def test_cached_step_of_one_device_is_its_micro_batches():
    alone = [SideDevice(agent_id="a", compute_s=0.2, read_s=0.05)]

    found = cached_step(alone, even(1), num_micro_batches=8, gradient_bytes=10**9)

    assert found.step_s == pytest.approx(2.0)
    assert (found.compute_s, found.read_s, found.reduce_s) == (pytest.approx(1.6), pytest.approx(0.4), 0.0)


def test_cached_step_shares_follow_speed_and_every_link_carries_one_sum_and_one_total():
    found = cached_step(sides(0.1, 0.2, 0.2), even(3), num_micro_batches=8, gradient_bytes=1_250_000)

    assert sorted(found.owners.count(place) for place in range(3)) == [2, 2, 4]
    # The last pass hides all but what the sum itself computes, and the last MiB, which takes three links more.
    message_s = (1 << 20) / GIGABIT
    assert found.reduce_s == pytest.approx(1_250_000 * BUSY_S_PER_BYTE + 3 * message_s)
    assert found.step_s == pytest.approx(0.4 + found.reduce_s)
    # Where the links are slow: one gradient over each of two links there and two back at once, beside the quickest's
    # backward pass, which is two thirds of its seconds.
    slow = cached_step(sides(1.0, 2.0, 2.0), even(3, GIGABIT / 10), num_micro_batches=8, gradient_bytes=12_500_000)
    assert len(slow.agent_ids) == 3
    assert slow.reduce_s == pytest.approx(1.0 - 1.0 / 1.5 + 3 * 10 * message_s)


def test_cached_step_leaves_out_devices_whose_gradients_cost_more_than_they_save():
    found = cached_step(sides(0.1, 0.1, 0.1), even(3, 1e5), num_micro_batches=8, gradient_bytes=10**6)

    assert found.agent_ids == ("d0",)


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.floats(0.01, 1.0), min_size=1, max_size=5),
    st.integers(1, 16),
    st.floats(1e5, 1e9),
    st.floats(0.01, 1.0),
)
def test_cached_step_is_never_slower_with_a_device_or_bandwidth_more(seconds, num_micro_batches, bandwidth, another):
    def step_s(some, rate):
        return cached_step(
            sides(*some), even(len(some), rate), num_micro_batches=num_micro_batches, gradient_bytes=10**6
        ).step_s

    here_s = step_s(seconds, bandwidth)

    assert step_s(seconds, 2 * bandwidth) <= here_s * (1 + 1e-9)
    # A faster device may take the place of one that another order of the sum liked better, never of all.
    assert here_s <= min(seconds) * num_micro_batches * (1 + 1e-9)
    assert step_s([*seconds, max(seconds) + another], bandwidth) <= here_s * (1 + 1e-9)


def cached_job(table, share, **more):
    changes = {"batch_rows": 16, "micro_batch_rows": 2, "cached_steps_share": share, "entry_token_bytes": 256}
    return job(table, ParallelAdaptersConfig(reduction=4), **(changes | more))


def test_cached_step_of_a_job_needs_a_side_network_and_room_for_it():
    table = llama(4)
    shape, links = cached_job(table, 1.0, cached_ways=("data-parallel",)), LinkTable()
    devices = [device("a"), device("b", available_mib=300)]

    pricer = Pricer(table, shape, devices, links)

    assert side_worker_bytes(table, shape) > 0
    assert pricer.cached_step(((0,), (1,))).agent_ids == ("id-a",)
    assert pricer.cached_step(((1,),)) is None
    assert Pricer(table, job(table, LoraConfig()), devices, links).cached_step(((0,),)) is None


def test_sums_in_fp16_halve_the_seconds_of_gradients_of_replicas_and_of_epochs_from_the_cache():
    table, devices = llama(4), [device("a"), device("b"), device("c")]
    shape = cached_job(table, 1.0, cached_ways=("data-parallel",))
    exact, rounded = (
        Pricer(table, shape.model_copy(update={"sums": sums}), devices, LinkTable()) for sums in ("fp32", "fp16")
    )
    layout = ((0, 1), (2,))

    assert rounded.sum_s(layout, 0, 0, 2) == pytest.approx(exact.sum_s(layout, 0, 0, 2) / 2)
    assert rounded.sum_s(layout, 0, 0, 2) > 0
    steps = [pricer.cached_step(layout) for pricer in (rounded, exact)]
    assert len(steps[0].agent_ids) == len(steps[1].agent_ids) > 1
    assert steps[0].reduce_s == pytest.approx(steps[1].reduce_s / 2)
    assert "sums in fp16" in explain(search(table, rounded.shape, devices, LinkTable()))


def test_entries_of_a_micro_batch_are_read_at_the_disks_rate_and_all_else_is_computed():
    table = llama(8, vocab_size=200)
    shape = job(table, ParallelAdaptersConfig(reduction=8))

    slow, quick = (side_device(table, shape, device("a"), 256, rate) for rate in (1e6, 1e9))

    # 8 blocks and two places more, 2 x 64 tokens.
    assert slow.read_s == pytest.approx(10 * 2 * 64 * 256 / 1e6)
    assert slow.micro_batch_s - quick.micro_batch_s == pytest.approx(slow.read_s - quick.read_s)
    assert slow.compute_s == quick.compute_s > 0


def side_stage(seconds, owners, *, link_s=0.0, sum_s=0.0):
    replicas = tuple(SideDevice(agent_id=f"d{i}", compute_s=s, read_s=0.0) for i, s in enumerate(seconds))
    return SideStage(replicas=replicas, owners=owners, link_busy_s=link_s, link_latency_s=0.0, sum_s=sum_s)


def test_step_in_stages_is_one_way_there_and_back_and_the_slowest_stages_pace_for_the_others():
    alone = (0,) * 8
    found = staged_step([side_stage([0.1], alone, link_s=0.01), side_stage([0.3], alone)])
    shared = staged_step([side_stage([0.1], alone, link_s=0.01), side_stage([0.3, 0.3], (0, 1) * 4, sum_s=0.2)])

    assert found.step_s == pytest.approx(0.1 + 0.02 + 0.3 + 7 * 0.3)
    assert (found.in_stages, found.reduce_s, found.compute_s) == (True, 0.0, pytest.approx(2.4))
    # Two replicas halve the pace, and add up what they have found.
    assert shared.step_s == pytest.approx(0.1 + 0.02 + 0.3 + 7 * 0.15 + 0.2)


def test_slow_link_is_the_pace_of_a_step_in_stages():
    alone = (0,) * 8
    found = staged_step([side_stage([0.1], alone, link_s=0.5), side_stage([0.1], alone)])

    assert found.step_s == pytest.approx(0.2 + 1.0 + 7 * 0.5)


@given(st.lists(st.floats(0.1, 9.0), min_size=1, max_size=6), st.integers(6, 40))
def test_blocks_are_dealt_out_by_speed_and_no_stage_goes_without(speeds, num_blocks):
    layout = tuple((i,) for i in range(len(speeds)))

    cuts = cuts_by_speed(layout, speeds, [1.0] * num_blocks)

    assert (cuts[0], cuts[-1]) == (0, num_blocks)
    assert all(start < end for start, end in pairwise(cuts))


@pytest.mark.parametrize(("bandwidth", "in_stages"), [(2e4, True), (1e12, False)])
def test_later_epochs_stay_in_their_stages_where_gradients_would_cost_more_than_the_pipelines_bubble(
    bandwidth, in_stages
):
    table, links = llama(4), LinkTable(other=LinkProfile(bandwidth_bytes_per_s=bandwidth))
    devices = [device("a", speed=0.1), device("b", speed=0.1)]

    found, only = (
        search(table, cached_job(table, 20.0, exact_stages=2, **ways), devices, links)
        for ways in ({}, {"cached_ways": ("data-parallel",)})
    )

    assert (found.cached.in_stages, only.cached.in_stages) == (in_stages, False)
    assert found.cached.step_s <= only.cached.step_s
    assert ("in the same stages" in explain(found)) is in_stages


def test_search_takes_a_device_in_for_later_epochs_that_the_pipeline_alone_would_leave_out():
    table, links = llama(4), LinkTable(other=LinkProfile(bandwidth_bytes_per_s=GIGABIT, latency_s=0.08))
    devices = [device("a"), device("b")]

    ways = {"cached_ways": ("data-parallel",)}
    once = search(table, cached_job(table, 0.0), devices, links)
    often = search(table, cached_job(table, 20.0, **ways), devices, links)

    assert (len(once.agent_ids), len(often.agent_ids)) == (1, 2)
    assert once.cached is None and sorted(often.cached.owners.count(place) for place in range(2)) == [4, 4]
    assert often.step_s > once.step_s
    assert often.mean_step_s(20.0) == pytest.approx((often.step_s + 20 * often.cached.step_s) / 21)
    assert "from the activation cache: step" in explain(often)


@settings(max_examples=15, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from([0.3, 1.0, 3.0]), st.integers(303, 400)), min_size=1, max_size=3),
    st.sampled_from([1e6, 1e8]),
    st.sampled_from([0.5, 4.0]),
)
def test_search_with_cached_epochs_equals_the_cheapest_of_all_layouts_and_cuts(numbers, bandwidth, share):
    table, links = llama(3), LinkTable(other=LinkProfile(bandwidth_bytes_per_s=bandwidth, latency_s=1e-3))
    devices = [device(f"d{i}", speed=speed, available_mib=mib) for i, (speed, mib) in enumerate(numbers)]
    # A step in stages depends on the cuts, too, and layouts are compared by a guess of them.
    shape = cached_job(table, share, cached_ways=("data-parallel",))
    pricer = Pricer(table, shape, devices, links)
    costs = [
        found.cost_s
        for layout in all_layouts(devices, links, max_stages=3, allow_replicas=True)
        for inner in combinations(range(1, 3), len(layout) - 1)
        if (found := pricer.candidate(layout, (0, *inner, 3))) is not None
    ]

    try:
        plan = search(table, shape, devices, links, allow_replicas=True)
    except InfeasiblePlanError:
        assert not costs
        return

    assert plan.mean_step_s(share) == pytest.approx(min(costs))


def prefix_job(table, share, **changes):
    values = {"batch_rows": 16, "micro_batch_rows": 2, "cached_steps_share": share, "entry_token_bytes": 256}
    values["frozen_share"] = 1 / (1 + share)
    return job(table, LoraConfig(blocks="last 4"), **(values | changes))


def test_search_with_a_frozen_prefix_deals_out_the_blocks_that_later_epochs_run():
    table, links = llama(12), LinkTable(other=LinkProfile(bandwidth_bytes_per_s=GIGABIT))
    devices = [device("a"), device("b")]

    once, often = (search(table, prefix_job(table, share, exact_stages=2), devices, links) for share in (0.0, 40.0))

    assert once.upper is None
    assert once.stages[0].end_block < often.stages[0].end_block == 10
    assert (often.upper.place, often.upper.row_bytes) == (8, 64 * 256)
    assert often.upper.step_s < once.step_s < often.step_s
    assert often.mean_step_s(40.0) == pytest.approx((often.step_s + 40 * often.upper.step_s) / 41)
    # What is told of the stages is the first epoch, in which all their blocks run.
    assert often.stages[0].forward_s > often.stages[1].forward_s * 2
    assert "blocks 0 to 7 run in the first epoch alone" in explain(often)


@pytest.mark.parametrize("share", [0.5, 4.0])
@pytest.mark.parametrize("bandwidth", [1e6, 1e8])
def test_search_with_a_frozen_prefix_equals_the_cheapest_of_all_layouts_and_cuts(share, bandwidth):
    table, links = llama(6), LinkTable(other=LinkProfile(bandwidth_bytes_per_s=bandwidth, latency_s=1e-3))
    devices = [device("a"), device("b", speed=3.0), device("c", speed=0.3, available_mib=305)]
    shape = prefix_job(table, share)
    pricer = Pricer(table, shape, devices, links)
    candidates = [
        candidate
        for layout in all_layouts(devices, links, max_stages=3, allow_replicas=False)
        for inner in combinations(range(1, 6), len(layout) - 1)
        if (candidate := pricer.candidate(layout, (0, *inner, 6))) is not None
    ]
    cheapest = min(candidates, key=lambda candidate: candidate.cost_s)

    found = search(table, shape, devices, links)

    assert [stage.end_block for stage in found.stages] == list(cheapest.cuts[1:])
    assert found.step_s == pytest.approx(pricer.first_epoch(cheapest).step_s)


def test_steps_without_the_prefix_carry_nothing_over_the_borders_below_it_and_read_it_from_the_disk():
    table, links = llama(12), LinkTable(other=LinkProfile(bandwidth_bytes_per_s=1e6))
    devices = [device("a"), device("b")]
    shape = prefix_job(table, 4.0)
    pricer = Pricer(table, shape, devices, links)

    below, alone = (pricer.candidate(layout, cuts) for layout, cuts in ((((0,), (1,)), (0, 8, 12)), (((0,),), (0, 12))))
    slow_disk = Pricer(table, shape.model_copy(update={"entry_token_bytes": 256_000}), devices, links)

    # All that trains is on one device in both.
    assert pricer.upper_step(below).step_s == pytest.approx(pricer.upper_step(alone).step_s)
    more_s = slow_disk.upper_step(alone).step_s - pricer.upper_step(alone).step_s
    assert more_s == pytest.approx(8 * read_s(table, slow_disk.shape) - 8 * read_s(table, shape))


def test_devices_that_are_replicas_already_stay_in_their_places_unless_another_order_gains():
    order = (2, 0, 1)
    alike = even(3)
    alike[0][1] = alike[1][0] = GIGABIT * 1.003
    quicker = even(3, GIGABIT / 100)
    for i, j in ((0, 1), (1, 2)):
        quicker[i][j] = quicker[j][i] = GIGABIT
    numbers = {"num_micro_batches": 3, "gradient_bytes": 12_500_000, "standing": order}

    stays = cached_step(sides(1.0, 1.001, 1.002), alike, **numbers)
    moves = cached_step(sides(1.0, 1.001, 1.002), quicker, **numbers)

    assert [stays.agent_ids[place] for place in stays.owners] == ["d2", "d0", "d1"]
    assert [moves.agent_ids[place] for place in moves.owners] == ["d0", "d1", "d2"]


def test_plan_of_replicas_trains_from_the_cache_where_it_trained_before():
    table = llama(4)
    shape = cached_job(table, 0.9, cached_ways=("data-parallel",))
    devices = [device("a", speed=1.0), device("b", speed=1.02), device("c", speed=1.01)]
    pricer = Pricer(table, shape, devices, LinkTable())

    for layout in (((2, 1, 0),), ((1, 2, 0),)):
        found = pricer.cached_step(layout)
        places = [devices[layout[0][place]].agent_id for place in pricer.owners(layout[0], is_alone=True)]
        assert [found.agent_ids[place] for place in found.owners] == places
