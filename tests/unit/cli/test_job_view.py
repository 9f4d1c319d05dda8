from __future__ import annotations

import pytest

from coordinator.job_view import JobView, told
from plutino import events
from plutino.client import NumberedEvent
from plutino.sizes import MIB
from tests.unit.client.job_history import history, plan, state, step, worker


def view_of(*told_events: events.JobEvent) -> JobView:
    view = JobView("fake-1")
    for number, event in enumerate(told_events, start=1):
        view.take(NumberedEvent(number=number, at_s=float(number), event=event))
    return view


def planned() -> events.PlanMade:
    return events.PlanMade(plan_epoch=1, plan_json=plan().model_dump_json(), search_s=0.0)


def test_view_whole_history_holds_what_came_of_the_job():
    view = view_of(*history())

    assert (view.state, view.step, view.losses, view.has_ended) == ("succeeded", 2, {0: 3.0, 1: 1.5}, True)
    assert (view.metrics("before"), view.metrics("after")) == ({"exact_match": 0.0}, {"exact_match": 0.75})
    assert view.exported is not None and view.exported.adapter_dir == "/out/adapter"


def test_view_steps_give_speed_and_time_left():
    view = view_of(state("running"), step(0, 3.0))

    assert (view.tokens_per_s, view.step_s, view.eta_s) == (50.0, 2.0, 2.0)


def test_view_busiest_worker_sets_the_bubble():
    view = view_of(planned(), step(0, 3.0, busy_share=0.25), step(1, 3.0, busy_share=0.75))

    assert view.workers[0, 0].busy_share == 0.5
    assert view.bubble_share == 0.5


def test_view_peak_never_falls():
    usage = events.WorkerUsage(
        worker=worker(1), rss_bytes=310 * MIB, peak_rss_bytes=310 * MIB, cpu_s=1.0, predicted_peak_bytes=0
    )
    view = view_of(planned(), step(0, 3.0), events.Usage(workers=(usage,)))

    assert (view.workers[1, 0].rss_bytes, view.workers[1, 0].peak_rss_bytes) == (310 * MIB, 351 * MIB)
    assert view.workers[1, 0].measured_job_bytes == 51 * MIB


def test_view_loading_worker_tells_how_far_it_is_until_it_has_loaded():
    loading = events.WorkerLoading(
        worker=worker(1),
        plan_epoch=1,
        done_bytes=3 * MIB,
        total_bytes=9 * MIB,
        bytes_by_place={"cache": MIB, "coordinator": 2 * MIB},
    )
    name = loading.worker.device_name

    view = view_of(planned(), loading)
    assert view.workers[1, 0].loading == f"{name} loads stage 1: 3 MiB of 9 MiB (coordinator 2 MiB, cache 1 MiB)"

    loaded = events.WorkerLoaded(
        worker=worker(1),
        plan_epoch=1,
        start_block=1,
        end_block=2,
        bytes_read=9 * MIB,
        tensors_read=3,
        seconds=1.0,
        rss_bytes=MIB,
        trainable_parameters=1,
    )
    assert view_of(planned(), loading, loaded).workers[1, 0].loading is None


def test_view_job_that_went_back_forgets_the_undone_losses():
    view = view_of(state("running"), step(0, 3.0), step(1, 1.5), state("recovering", next_step=1))

    assert (view.losses, view.step) == ({0: 3.0}, 1)


def test_view_new_plan_replaces_the_stages():
    view = view_of(planned(), step(0, 3.0), planned())

    assert [stage.peak_rss_bytes for stage in view.workers.values()] == [0, 0]


def test_view_loss_of_a_worker_is_noted():
    lost = events.WorkerLost(worker=worker(1), plan_epoch=1, reason="killed by signal 9")

    assert list(view_of(lost).notes) == ["lost the worker of stage 1 on beta: killed by signal 9"]


@pytest.mark.parametrize("event", history())
def test_told_every_event_of_a_history_has_a_line(event):
    assert told(event)


def test_told_usage_has_no_line():
    assert told(events.Usage(workers=())) is None
