from __future__ import annotations

from pathlib import Path

import pytest
import torch

from coordinator.artifacts.traces import KEPT_STEPS, TraceStore
from coordinator.jobs.tracing import RECORD_EVERY, TraceGatherer, is_recorded
from edge_node.engine.recorder import StepRecorder
from edge_node.engine.schedule import Backward, Forward, Receive, Send
from edge_node.transport.base import MessageKind, Peer
from edge_node.worker_reports import step_trace
from partitioner.trace import MAX_SPANS, StepTrace
from plutino.errors import UnknownJobError, WireError
from plutino.types import JobId, WorkerRef
from protos import workers_pb2 as pb

CPU = torch.device("cpu")
FIRST, SECOND = (WorkerRef(JobId("j"), 3, stage, 0) for stage in (0, 1))


def recorded(step: int = 7) -> pb.StepTrace:
    seconds = iter([101.0, 102.5])
    recorder = StepRecorder(CPU, clock=lambda: next(seconds))
    recorder.end_action(Forward(4), 100.0)
    recorder.end("wait", -1, 101.0)
    return step_trace(step, recorder)


def test_recorder_names_every_action_and_leaves_out_what_is_beyond_the_bound():
    recorder = StepRecorder(CPU, clock=lambda: 1.0)
    below = Peer(1, 0)
    for action in (
        Receive(0, MessageKind.FORWARD, below),
        Forward(0),
        Send(0, MessageKind.FORWARD, below),
        Backward(0),
        Send(0, MessageKind.BACKWARD, below),
    ):
        recorder.end_action(action, 0.0)
    assert [span.kind for span in recorder.spans] == ["wait", "forward", "send down", "backward", "send up"]

    for _ in range(MAX_SPANS):
        recorder.end("wait", -1, 0.0)
    assert (len(recorder.spans), recorder.num_left_out) == (MAX_SPANS, 5)
    assert step_trace(0, recorder).ByteSize() < 64 * 1024


def test_recorded_steps_are_the_third_of_a_plan_and_every_64th_after_it():
    found = [step for step in range(300) if is_recorded(step, start_step=10, end_step=300)]
    assert found == [12, 12 + RECORD_EVERY, 12 + 2 * RECORD_EVERY, 12 + 3 * RECORD_EVERY, 12 + 4 * RECORD_EVERY]
    assert [step for step in range(2) if is_recorded(step, start_step=0, end_step=2)] == [1]


def test_gatherer_gives_a_step_once_all_workers_have_told_of_it():
    gatherer = TraceGatherer()
    assert gatherer.add(SECOND, recorded(), [FIRST, SECOND]) is None

    trace = gatherer.add(FIRST, recorded(), [FIRST, SECOND])

    assert trace is not None
    assert (trace.step, trace.plan_epoch, [worker.stage for worker in trace.workers]) == (7, 3, [0, 1])
    spans = trace.workers[0].spans
    assert [(span.kind, span.micro_batch, span.start_s, span.end_s) for span in spans] == [
        ("forward", 4, 0.0, 1.0),
        ("wait", -1, 1.0, 2.5),
    ]


def test_gatherer_forgets_what_workers_of_an_older_plan_told():
    gatherer = TraceGatherer()
    gatherer.add(FIRST, recorded(), [FIRST, SECOND])
    newer = WorkerRef(JobId("j"), 4, 1, 0)

    assert gatherer.add(newer, recorded(), [WorkerRef(JobId("j"), 4, 0, 0), newer]) is None


@pytest.mark.parametrize(
    "change",
    [
        {"kinds": [99, 0]},
        {"micro_batches": [1]},
        {"kinds": [0] * 5000, "micro_batches": [0] * 5000, "start_us": [0] * 5000, "duration_us": [0] * 5000},
    ],
)
def test_gatherer_refuses_a_malformed_record(change: dict[str, list[int]]):
    message = recorded()
    for name, values in change.items():
        message.ClearField(name)
        getattr(message, name).extend(values)

    with pytest.raises(WireError, match="malformed"):
        TraceGatherer().add(FIRST, message, [FIRST])


def test_store_keeps_the_first_recorded_step_and_the_newest(tmp_path: Path):
    store = TraceStore(tmp_path)
    for step in range(12):
        store.put_step("j", StepTrace(step=step, plan_epoch=1, workers=()))

    assert store.steps("j") == (0, *range(12 - KEPT_STEPS + 1, 12))
    assert store.step("j", None)[0].step == 11
    with pytest.raises(UnknownJobError, match="recorded are: 0, 5"):
        store.step("j", 3)
    with pytest.raises(UnknownJobError, match="no step of job other is recorded yet"):
        store.step("other", None)
