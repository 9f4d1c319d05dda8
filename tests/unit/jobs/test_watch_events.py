from __future__ import annotations

import math

import pytest

from plutino import events
from plutino.errors import WireError
from plutino.events import EVENTS, JobEvent, event_json, parse_event

WORKER = events.WorkerName(stage_index=1, device_name="pi-3")
TIMES = events.WorkerStepTimes(
    worker=WORKER,
    total_s=1.5,
    compute_s=1.0,
    wait_s=0.25,
    serialise_s=0.125,
    commit_s=0.125,
    sent_bytes=4096,
    rss_bytes=1 << 30,
    peak_rss_bytes=2 << 30,
)
SAMPLES: tuple[JobEvent, ...] = (
    events.JobStateChanged(state="running", reason="", next_step=3, total_steps=10),
    events.DataRead(num_train_rows=100, num_eval_rows=10, total_steps=7),
    events.PlanMade(plan_epoch=1, plan_json="{}", search_s=0.5),
    events.WorkerLoading(
        worker=WORKER, plan_epoch=1, done_bytes=3, total_bytes=9, bytes_by_place={"cache": 1, "coordinator": 2}
    ),
    events.WorkerLoaded(
        worker=WORKER,
        plan_epoch=1,
        start_block=0,
        end_block=4,
        bytes_read=1,
        tensors_read=2,
        seconds=0.5,
        rss_bytes=3,
        trainable_parameters=4,
        bytes_by_place={"folder": 1},
    ),
    events.StepCommitted(
        step=3,
        plan_epoch=1,
        loss=0.1 + 0.2,
        grad_norm=math.inf,
        clip_scale=0.0,
        lr=2e-4,
        tokens=512,
        label_tokens=64,
        seconds=1.5,
        commit_s=0.004,
        workers=(TIMES,),
    ),
    events.StepSkipped(step=3, plan_epoch=1, reason="stage 1.0: loss is nan"),
    events.Evaluated(step=4, loss=1.25, is_best=True, seconds=2.0),
    events.ScoringDone(
        when="after",
        num_rows=1,
        metrics={"exact_match": 1.0},
        sample_rows=(events.ScoredRow(prompt="2+2?", expected="4", answer="4", is_right=True),),
        seconds=3.0,
    ),
    events.ShadowDurable(step=4, bytes=1024, num_shadows=2),
    events.WorkerLost(worker=WORKER, plan_epoch=1, reason="exit code -9", out_of_memory=True),
    events.Recovering(decision="return", step=4, plan_epoch=2, undone_steps=1, reason="pi-3 left"),
    events.PlanChanges(step=4, plan_epoch=2, reason="blocks 5-7 from a to b, because a is slow"),
    events.Moved(
        step=4,
        plan_epoch=2,
        seconds=1.5,
        seconds_by_part={"store": 0.5, "load": 1.0},
        loading_by_part={"weights": 0.75},
        num_went_on=1,
        num_workers=2,
    ),
    events.Recovered(step=4, plan_epoch=2, seconds=6.0),
    events.Exported(
        adapter_dir="/out", bytes=9, num_tensors=8, checks=(events.Verification(name="keys", result="equal"),)
    ),
    events.Usage(
        workers=(events.WorkerUsage(worker=WORKER, rss_bytes=1, peak_rss_bytes=2, cpu_s=0.5, predicted_peak_bytes=3),)
    ),
    events.Notice(level="warning", text="2 rows were cut"),
)


def test_registry_holds_every_event_under_its_own_name() -> None:
    assert {event.kind: type(event) for event in SAMPLES} == EVENTS
    assert set(EVENTS.values()) == set(JobEvent.__subclasses__())


@pytest.mark.parametrize("event", SAMPLES, ids=lambda event: event.kind)
def test_event_round_trips_through_json(event: JobEvent) -> None:
    assert parse_event(event.kind, event_json(event)) == event


def test_parse_event_of_unknown_kind_tells_to_upgrade() -> None:
    with pytest.raises(WireError, match="unknown kind 'Teleported'; upgrade plutino"):
        parse_event("Teleported", "{}")


@pytest.mark.parametrize("text", ["{", "{}", '{"level": "info", "text": "a", "colour": "red"}'])
def test_parse_event_of_other_shape_is_refused(text: str) -> None:
    with pytest.raises(WireError, match="of kind Notice cannot be read"):
        parse_event("Notice", text)
