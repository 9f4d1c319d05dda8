"""What a plan says of its links, of what binds and of what would relieve it, against the simulator and the search."""

from __future__ import annotations

import re
from collections import Counter

import pytest

from partitioner.adapter import adapter_params_of
from partitioner.climb import Limits
from partitioner.device import LinkProfile, LinkTable
from partitioner.link_uses import link_uses
from partitioner.orders import all_layouts
from partitioner.pricing import Pricer
from partitioner.relief import bottleneck, reliefs
from partitioner.search import search
from partitioner.simulate import simulate_step
from plutino.job.method import FullConfig
from tests.unit.partitioner.fleet import SLOW_LAN, TIGHT, device, job, llama

DEVICES = [device("a"), device("b", speed=2), device("c", speed=0.5)]


def link(bandwidth_bytes_per_s: float) -> LinkTable:
    return LinkTable(other=LinkProfile(bandwidth_bytes_per_s=bandwidth_bytes_per_s, latency_s=1e-3))


@pytest.mark.parametrize("changes", [{}, {"codec": "bf16"}, {"sums": "fp16"}, {"replicas_fold": True}])
def test_links_carry_what_the_simulator_sends_and_replicas_sum(changes: dict[str, object]) -> None:
    table, links = llama(5), link(1e6)
    pricer = Pricer(table, job(table, micro_batch_rows=1, **changes), DEVICES, links)
    for layout in all_layouts(DEVICES, links, max_stages=3, allow_replicas=True):
        found = pricer.candidate(layout, pricer.clamped(layout, tuple(range(len(layout) + 1))))
        spans = simulate_step(found.groups, pricer.num_micro_batches).spans
        uses = link_uses(pricer, found)

        messages = [use for use in uses if use.carries == "hidden states"]
        sent = Counter(span.kind for span in spans)
        assert sum(use.down_bytes for use in messages) == sent["send down"] * pricer.message_bytes
        assert sum(use.up_bytes for use in messages) == sent["send up"] * pricer.message_bytes
        sent_s = sum(span.end_s - span.start_s for span in spans if span.kind == "send down")
        assert sum(use.busy_s for use in messages) == pytest.approx(sent_s)
        busy_s = Counter()
        for span in spans:
            if span.kind in ("forward", "backward"):
                busy_s[span.stage, span.replica] += span.end_s - span.start_s
        assert found.time.bubble_share == pytest.approx(1 - max(busy_s.values()) / found.step_s)
        for group, of_group in zip(layout, found.groups, strict=True):
            names = {DEVICES[i].name for i in group}
            summed = [u for u in uses if u.carries == "sums of gradients" and {u.from_device, u.to_device} <= names]
            assert len(summed) >= len(group) - 1
            assert bool(summed) == (of_group.sum_s > 0)


def test_replicas_of_one_stage_have_a_link_although_no_hidden_states_travel() -> None:
    table = llama(4)
    devices = [device("a"), device("b")]
    plan = search(table, job(table, micro_batch_rows=1, exact_stages=1), devices, allow_replicas=True)

    (use,) = plan.links
    params = sum(job(table).adapter_params)
    assert (use.carries, use.down_bytes, use.up_bytes) == ("sums of gradients", 4 * params, 4 * params)


def test_tied_embedding_that_is_trained_goes_between_the_ends_of_the_pipeline_and_is_waited_for() -> None:
    table, devices, links = llama(4), [device("a"), device("b")], link(1e6)
    assert table.is_tied
    fields = adapter_params_of(table, FullConfig()).shape_fields
    shape = job(table, **fields)
    pricer = Pricer(table, shape, devices, links)
    found = pricer.candidate(((0,), (1,)), (0, 2, 4))

    (use,) = [use for use in link_uses(pricer, found) if use.carries == "sums of gradients"]

    assert (use.down_bytes, use.up_bytes) == (4 * table.head_params, 4 * table.head_params)
    untied = Pricer(table, shape.model_copy(update={"tied_trainable_params": 0}), devices, links)
    waited_s = found.step_s - untied.candidate(((0,), (1,)), (0, 2, 4)).step_s
    assert waited_s >= use.busy_s


def test_sum_over_replicas_that_takes_longest_is_the_bottleneck_and_16_bits_relieve_it() -> None:
    table, links = llama(4), link(1e4)
    shape, devices = job(table, micro_batch_rows=1, exact_stages=1), [device("a"), device("b")]
    pricer = Pricer(table, shape, devices, links)
    found = pricer.candidate(((0, 1),), (0, 4))

    assert bottleneck(pricer, found).startswith("the sum of gradients over the replicas of stage 0, a + b: ")
    assert bottleneck(pricer, found).endswith("wait for it")
    limits = Limits(max_stages=1, exact_stages=1, allow_replicas=True)
    halved = next(relief for relief in reliefs(pricer, found, (), limits) if relief.what == "placement.sums: fp16")
    assert halved.step_s < 0.7 * found.step_s


FLEETS = {
    "compute": (job(llama(8)), [device("a"), device("b", speed=2)], link(1e9)),
    "network": (job(llama(8), exact_stages=2), [device("a"), device("b")], SLOW_LAN),
    "memory": (
        job(llama(8), **TIGHT),
        [device("a", available_mib=600), device("b", speed=9, available_mib=440)],
        link(1e9),
    ),
}


@pytest.mark.parametrize("case", FLEETS)
def test_every_relief_that_is_named_is_what_a_search_on_that_fleet_would_reach(case: str) -> None:
    shape, devices, links = FLEETS[case]
    plan = search(llama(8), shape, devices, links)
    told = re.findall(r"([^;]+): ([\d.e-]+) s a step", plan.relief)
    assert told

    for what, seconds in told:
        step_s = _searched_s(what.strip(), shape, devices, links)
        # The search may find more than the few steps that the relief was priced with.
        assert step_s <= float(seconds) * 1.01 and float(seconds) < plan.step_s


def _searched_s(what: str, shape: object, devices: list, links: LinkTable) -> float:
    if what.startswith("placement.codec"):
        shape = shape.model_copy(update={"codec": "bf16"})
    elif what.startswith("a faster network"):
        links = LinkTable(other=LinkProfile(bandwidth_bytes_per_s=1e18, latency_s=0.0))
    elif what.startswith("one device more like "):
        like = next(d for d in devices if d.name == what.removeprefix("one device more like "))
        devices = [*devices, like.model_copy(update={"agent_id": "new", "host_id": "new"})]
    elif what.endswith(" times as fast"):
        devices = [_twice(d) if d.name == what.split()[0] else d for d in devices]
    else:
        more = dict(re.findall(r"(?:^|and )([\d.]+ [KMG]iB) more memory on (\S+)", what))
        assert more, what
        devices = [d.model_copy(update={"available_bytes": 1 << 40}) if d.name in more.values() else d for d in devices]
    return search(llama(8), shape, devices, links).step_s


def _twice(one: object) -> object:
    return one.model_copy(update={"timings": one.timings.times(0.5)})
