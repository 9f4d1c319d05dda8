from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from partitioner.cost import StageCost
from partitioner.replay import StageGroup
from partitioner.simulate import simulate_step
from partitioner.trace import StepTrace, WorkerTrace


def pipeline(num_stages, busy_s=0.0, latency_s=0.0):
    links = (((busy_s, latency_s),),)
    return [StageGroup((StageCost(1.0 + k, 2.0),), (), links) for k in range(num_stages)]


def recorded(trace, zeros_s):
    """The trace as each worker would tell it by a clock with another zero."""
    workers = []
    for (stage, replica), zero_s in zip(trace.workers, zeros_s, strict=False):
        own = [span for span in trace.spans if (span.stage, span.replica) == (stage, replica)]
        spans = tuple(s.model_copy(update={"start_s": s.start_s + zero_s, "end_s": s.end_s + zero_s}) for s in own)
        workers.append(WorkerTrace(stage=stage, replica=replica, spans=spans))
    return StepTrace(step=3, plan_epoch=1, workers=tuple(workers))


@settings(max_examples=20, deadline=None)
@given(st.lists(st.floats(-1e4, 1e4), min_size=4, max_size=4), st.integers(2, 4), st.integers(1, 6))
def test_clocks_of_a_run_are_set_right_where_messages_take_no_time(zeros_s, num_stages, num_micro_batches):
    real = simulate_step(pipeline(num_stages), num_micro_batches)

    found = recorded(real, zeros_s).on_one_clock()

    assert found.step_s == pytest.approx(real.step_s, abs=1e-6)
    assert [span.start_s for span in found.spans] == pytest.approx([s.start_s for s in real.spans], abs=1e-6)


def test_clocks_of_a_run_are_off_by_less_than_a_message_takes():
    real = simulate_step(pipeline(3, busy_s=0.2, latency_s=0.1), 6)

    found = recorded(real, [0.0, 50.0, -7.0]).on_one_clock()

    for k in (1, 2):
        ends = {s.micro_batch: s.end_s for s in found.spans if (s.stage, s.kind) == (k - 1, "forward")}
        starts = {s.micro_batch: s.start_s for s in found.spans if (s.stage, s.kind) == (k, "forward")}
        assert all(starts[m] >= ends[m] for m in starts)
    assert abs(found.step_s - real.step_s) <= 0.3


def test_clocks_of_replicas_are_set_by_the_stage_that_they_share_micro_batches_with():
    links = ((((0.0, 0.0),)), (((0.0, 0.0),)))
    groups = [
        StageGroup((StageCost(1.0, 2.0), StageCost(1.0, 2.0)), (0, 1, 0, 1), links),
        StageGroup((StageCost(0.5, 0.5),), (0, 0, 0, 0)),
    ]
    real = simulate_step(groups, 4)

    found = recorded(real, [0.0, 100.0, -30.0]).on_one_clock()

    # Half of the shortest time that somebody waited: what a message could have taken.
    assert abs(found.step_s - real.step_s) <= 0.5


def test_trace_of_a_run_crosses_a_process_border():
    step = recorded(simulate_step(pipeline(2), 2), [0.0, 5.0])

    assert StepTrace.model_validate_json(step.model_dump_json()) == step
