from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from partitioner.device import LinkProfile, LinkTable, MeasuredLink
from partitioner.explain import explain
from partitioner.report import replayed
from partitioner.search import choose_micro_batch, search
from plutino.errors import InfeasiblePlanError
from tests.unit.partitioner.drawn_fleets import LINKS, fleets
from tests.unit.partitioner.fleet import device, job, llama


def test_choose_codec_is_lossy_only_where_that_saves_notably():
    table = llama(6)
    devices = [device(name) for name in "ab"]
    shape = job(table, batch_rows=16, exact_stages=2)

    slow, fast = (
        choose_micro_batch(
            table,
            shape,
            devices,
            LinkTable(other=LinkProfile(bandwidth_bytes_per_s=rate, latency_s=1e-4)),
            codecs=("raw", "bf16"),
        )
        for rate in (1e6, 1e9)
    )

    assert (slow.codec, fast.codec) == ("bf16", "raw")


def bf16_over(links, **changes):
    table = llama(6)
    shape = job(table, batch_rows=16, exact_stages=3, **changes)
    return choose_micro_batch(table, shape, [device(name) for name in "abc"], links, codecs=("raw", "bf16")), shape


def test_choose_codec_rounds_at_the_slow_link_alone_and_prices_each_boundary_by_its_own():
    fast = LinkProfile(bandwidth_bytes_per_s=1e9, latency_s=1e-4)
    measured = (MeasuredLink(agent_ids=("id-a", "id-b"), link=fast),)
    links = LinkTable(measured=measured, other=LinkProfile(bandwidth_bytes_per_s=1e6, latency_s=1e-4))

    plan, shape = bf16_over(links)

    assert plan.codec == "raw" and len(plan.bf16_borders) == 1
    by_link = {(link.from_device, link.to_device): link.down_bytes for link in plan.links}
    (slow,) = (pair for pair in by_link if set(pair) != {"a", "b"})
    (quick,) = (pair for pair in by_link if set(pair) == {"a", "b"})
    assert by_link[quick] == 2 * by_link[slow]
    found = replayed(plan, llama(6), shape, [device(name) for name in "abc"], links)
    assert found.step_s == pytest.approx(plan.step_s)
    assert "bf16 at 1 of 2 boundaries" in explain(plan)


def test_search_keeps_recorded_borders_wherever_it_cuts():
    """As a re-plan under a fixed record: a cut at a recorded border costs half of what it costs elsewhere."""
    table, slow = llama(6), LinkTable(other=LinkProfile(bandwidth_bytes_per_s=2e5, latency_s=1e-4))
    devices = [device("a"), device("b")]

    plans = {
        borders: search(table, job(table, batch_rows=16, exact_stages=2, bf16_borders=borders), devices, slow)
        for borders in ((), (2,), (4,))
    }

    assert [plan.bf16_borders for plan in plans.values()] == [(), (2,), (4,)]
    assert max(plans[2,].step_s, plans[4,].step_s) < plans[()].step_s


@settings(max_examples=10, deadline=None)
@given(fleets(3), LINKS, st.sampled_from([(1,), (2, 3), (1, 2, 3, 4)]))
def test_search_with_recorded_borders_is_within_budget_and_never_below_its_bound(devices, links, borders):
    table = llama(5)
    try:
        plan = search(table, job(table, bf16_borders=borders), devices, links)
    except InfeasiblePlanError:
        return
    raw = search(table, job(table), devices, links)

    assert all(stage.peak_bytes <= stage.budget_bytes for stage in plan.stages)
    assert plan.bound_s <= plan.step_s * (1 + 1e-9) and plan.step_s <= raw.step_s * (1 + 1e-9)
