from __future__ import annotations

from xml.etree import ElementTree

import pytest

from partitioner.compare import compare, compared_svg, compared_text
from partitioner.cost import StageCost
from partitioner.replay import StageGroup
from partitioner.simulate import simulate_step
from partitioner.trace import StepTrace, WorkerTrace
from plutino.errors import PlanError

NAMES = [["laptop"], ["desktop"]]
M = 4


def groups(forward_s=1.0, busy_s=0.0):
    links = (((busy_s, 0.0),),)
    return [StageGroup((StageCost(forward_s, 2.0),), (), links), StageGroup((StageCost(1.0, 2.0),))]


def recorded(trace):
    """As workers whose clocks differ by an hour would tell it."""
    workers = []
    for stage, replica in trace.workers:
        spans = [s for s in trace.spans if (s.stage, s.replica) == (stage, replica)]
        moved = (
            s.model_copy(update={"start_s": s.start_s + 3600 * stage, "end_s": s.end_s + 3600 * stage}) for s in spans
        )
        workers.append(WorkerTrace(stage=stage, replica=replica, spans=tuple(moved)))
    return StepTrace(step=7, plan_epoch=1, workers=tuple(workers))


def test_compare_a_run_as_predicted_has_no_difference():
    found = compare(groups(), M, recorded(simulate_step(groups(), M)))

    assert found.computing_s == pytest.approx(0.0) and found.other_s == pytest.approx(0.0, abs=1e-6)
    assert [worker.ratio for worker in found.workers] == pytest.approx([1.0, 1.0])


def test_compare_a_slow_device_is_computing_and_a_slow_link_is_not():
    slow_device = compare(groups(), M, recorded(simulate_step(groups(forward_s=2.0), M)))
    slow_link = compare(groups(), M, recorded(simulate_step(groups(busy_s=3.0), M)))

    assert slow_device.computing_s == pytest.approx(3.0) and abs(slow_device.other_s) < 0.1
    assert slow_device.workers[0].ratio == pytest.approx(4.0 / 3.0)
    assert slow_link.computing_s == pytest.approx(0.0) and slow_link.other_s > 3.0


def test_compare_refuses_a_step_of_another_plan():
    with pytest.raises(PlanError, match="the backward pass of micro-batch 4 on stage 0"):
        compare(groups(), M, recorded(simulate_step(groups(), M + 1)))


def test_compare_draws_all_three_on_one_scale():
    found = compare(groups(), M, recorded(simulate_step(groups(forward_s=2.0), M)))

    text, svg = compared_text(found, NAMES, width=60), ElementTree.fromstring(compared_svg(found, NAMES))

    assert text.count("0.0 laptop") == 3 and text.count(f"{found.measured.step_s:.4g} s\n") >= 3
    assert "stage 0 on laptop: computed 16 s, predicted 12 s (1.33 x)" in text
    bars = svg.findall(".//{*}rect/{*}title")
    assert len(bars) == len(found.predicted.spans) + len(found.replayed.spans) + len(found.measured.spans)
