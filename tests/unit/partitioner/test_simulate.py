from __future__ import annotations

from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from partitioner.cost import StageCost
from partitioner.device import LinkProfile, LinkTable
from partitioner.gantt import gantt_svg, gantt_text
from partitioner.orders import all_layouts
from partitioner.pricing import Pricer
from partitioner.replay import StageGroup
from partitioner.simulate import Churn, Noise, simulate_run, simulate_step
from partitioner.trace import Trace
from tests.unit.partitioner.fleet import device, job, llama

DEVICES = [device("a"), device("b", speed=2), device("c", speed=0.5)]


def candidates(rows, bandwidth):
    table = llama(5)
    links = LinkTable(other=LinkProfile(bandwidth_bytes_per_s=bandwidth, latency_s=1e-3))
    pricer = Pricer(table, job(table, micro_batch_rows=rows), DEVICES, links)
    for layout in all_layouts(DEVICES, links, max_stages=3, allow_replicas=True):
        found = pricer.candidate(layout, pricer.clamped(layout, tuple(range(len(layout) + 1))))
        yield found, pricer.num_micro_batches


@settings(max_examples=12, deadline=None)
@given(st.sampled_from([1, 2, 8]), st.sampled_from([2e5, 1e7, 1e9]))
def test_simulated_step_without_noise_is_the_replay(rows, bandwidth):
    for candidate, num_micro_batches in candidates(rows, bandwidth):
        trace = simulate_step(candidate.groups, num_micro_batches)

        # Relative 1e-9: the same sums in another order.
        assert trace.step_s == pytest.approx(candidate.step_s, rel=1e-9)
        assert max(trace.busy_s().values()) == pytest.approx(max(candidate.time.busy_s))


def test_simulated_step_is_reproducible_by_seed_and_strays_from_the_prediction():
    candidate, m = max(candidates(1, 1e7), key=lambda found: len(found[0].layout))
    noise = Noise(compute_sigma=0.2, link_sigma=0.2)

    once, again, other = (simulate_step(candidate.groups, m, noise=noise, seed=s) for s in (1, 1, 2))

    assert once == again
    assert once.step_s != other.step_s != candidate.step_s


def test_simulated_step_shared_card_is_never_quicker_and_sometimes_slower():
    slower = 0
    for candidate, m in candidates(1, 2e5):
        shared = simulate_step(candidate.groups, m, noise=Noise(is_card_shared=True)).step_s
        assert shared >= candidate.step_s * (1 - 1e-9)
        slower += shared > candidate.step_s * 1.01
    assert slower > 0


def test_simulated_step_plays_a_trace_again():
    groups = [StageGroup((StageCost(1.0, 2.0),), (), (((0.1, 0.0),),)), StageGroup((StageCost(1.0, 2.0),))]
    real = simulate_step(groups, 6, noise=Noise(compute_sigma=0.5), seed=3)

    again = simulate_step(groups, 6, measured=Trace.model_validate_json(real.model_dump_json()).durations())

    assert again == real


def test_gantt_text_shows_every_worker_and_svg_every_span():
    candidate, m = max(candidates(1, 1e7), key=lambda found: len(found[0].layout))
    trace = simulate_step(candidate.groups, m)
    names = [[DEVICES[i].name for i in group] for group in candidate.layout]

    text = gantt_text(trace, names)
    rectangles = ElementTree.fromstring(gantt_svg(trace, names)).findall(".//{*}rect/{*}title")

    assert [line[:5] for line in text.splitlines()[:3]] == [f"{k}.0 {of_stage[0]}" for k, of_stage in enumerate(names)]
    assert "#" in text and "0" in text
    assert len(rectangles) == len(trace.spans)


def run(*, num_steps=200, step_s=None, **churn):
    by_number = step_s or {3: 1.0, 2: 2.0, 1: None, 0: None}
    return simulate_run(
        ["a", "b", "c"],
        lambda up: by_number[len(up)],
        lambda up: up,
        num_steps=num_steps,
        churn=Churn(**({"mean_up_s": 60.0, "mean_down_s": 20.0, "recovery_s": 3.0, "durable_every": 4} | churn)),
        seed=5,
    )


def test_simulated_run_without_losses_takes_its_steps():
    found = run(mean_up_s=1e12)

    assert (found.seconds, found.steps, found.repeated_steps, found.waited_s) == (200.0, 200, 0, 0.0)


def test_simulated_run_with_losses_ends_later_repeats_steps_and_waits():
    found = run()

    assert found.steps == 200 and found.seconds > 200
    assert found.repeated_steps > 0 and found.waited_s > 0
    assert any("is lost" in event.what for event in found.events)
    assert any("waits" in event.what for event in found.events)
    assert found == run()


@pytest.mark.parametrize(("recovery_s", "moves"), [(1.0, True), (1e6, False)])
def test_simulated_run_takes_a_device_in_only_where_that_pays(recovery_s, moves):
    losing_one_costs_nothing = {3: 1.0, 2: 2.0, 1: 2.0, 0: None}
    found = simulate_run(
        ["a", "b", "c"],
        lambda up: losing_one_costs_nothing[len(up)],
        lambda up: up if len(up) == 3 else frozenset(sorted(up)[:1]),
        num_steps=400,
        churn=Churn(mean_up_s=90.0, mean_down_s=20.0, recovery_s=recovery_s),
        seed=5,
        horizon_s=1e5,
    )

    assert any("with 3 of 3 devices" in event.what for event in found.events) == moves
