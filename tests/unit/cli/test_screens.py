from __future__ import annotations

import io
from dataclasses import asdict

from rich.console import Console, RenderableType

from coordinator.job_view import JobView
from coordinator.screens import device_table, follow, job_panel, job_table, plain_lines, plan_table, summary
from partitioner.plan import UpperStep
from plutino.client import NumberedEvent
from plutino.hardware import Hardware
from tests.unit.client.job_history import history, plan, state, step


def numbered(events: list) -> list[NumberedEvent]:
    return [NumberedEvent(number=n, at_s=float(n), event=event) for n, event in enumerate(events, start=1)]


def drawn(renderable: RenderableType) -> str:
    console = Console(file=io.StringIO(), width=200)
    console.print(renderable)
    return console.file.getvalue()


def finished() -> JobView:
    view = JobView("fake-1")
    for one in numbered(history()):
        view.take(one)
    return view


def test_plan_table_shows_blocks_half_open_and_peak_beside_budget():
    shown = drawn(plan_table(plan()))

    assert "[0, 2)" in shown and "[2, 4)" in shown
    assert "360" in shown and "400" in shown


def test_plan_table_says_which_blocks_later_epochs_leave_out_and_what_is_kept():
    upper = UpperStep(place=3, step_s=0.5, row_bytes=1920, keeps_source=True)

    shown = drawn(plan_table(plan().model_copy(update={"upper": upper})))

    assert "step 0.5 s, blocks 0 to 2 run in the first epoch alone; kept are the encoder's output and what" in shown
    assert "from the activation cache" not in drawn(plan_table(plan()))


def test_job_panel_shows_progress_memory_and_busy_share():
    shown = drawn(job_panel(finished()))

    for told in ("succeeded", "step 2/2", "loss 1.5000", "50 tokens/s", "bubble 50%", "351", "360", "400", "50%"):
        assert told in shown


def test_job_panel_of_a_job_without_any_event_can_be_drawn():
    assert "fake-1" in drawn(job_panel(JobView("fake-1")))


def test_summary_shows_answers_side_by_side_and_how_to_load():
    shown = drawn(summary(finished()))

    assert "play some jazz  PlayMusic  once upon a time  PlayMusic" in shown
    assert (
        "AutoPeftModelForCausalLM.from_pretrained(" in shown and "perplexity on general text, trained: 12.50" in shown
    )


def test_summary_of_a_job_whose_scores_have_no_answers_shows_no_table_of_them():
    view = finished()
    for moment, score in view.scores.items():
        view.scores[moment] = score.model_copy(update={"sample_rows": ()})

    assert "expected" not in drawn(summary(view))


def test_device_table_without_devices_tells_how_to_start_one():
    assert "plutino token create" in drawn(device_table([]))


def test_device_table_brackets_in_a_reason_are_not_markup():
    device = {
        "name": "alpha", "state": "gone", "threads": 2, "memory_budget_bytes": 1 << 30, "baseline_bytes": 1 << 28,
        "reserved_bytes": 0, "agent_rss_bytes": 1 << 26, "links": [], "dtypes": ["fp32"],
        "versions": {"torch": "2.13.0"},
        "reason": "silent [for 15 s]", "hardware": asdict(Hardware(name="Cortex-A76", machine="aarch64")),
    }  # fmt: skip

    assert "silent [for 15 s]" in drawn(device_table([device]))


def test_job_table_without_jobs_tells_how_to_submit():
    assert "plutino submit" in drawn(job_table([], now_s=0.0))


def test_plain_lines_steps_come_at_most_every_two_seconds_and_at_the_end():
    steps = [step(number, 3.0) for number in range(2)]
    dense = [NumberedEvent(number=n, at_s=0.1 * n, event=event) for n, event in enumerate([state("running"), *steps])]

    lines = list(plain_lines(JobView("fake-1"), dense))

    assert [line.split(" ", 1)[1].split("  ")[0] for line in lines] == ["running", "step 1/2", "step 2/2"]


def test_follow_on_a_terminal_ends_with_the_last_screen():
    console = Console(file=io.StringIO(), force_terminal=True, width=160)

    follow(JobView("fake-1"), numbered(history()), console)

    assert "succeeded" in console.file.getvalue() and "predicted:" in console.file.getvalue()


def test_follow_without_a_terminal_prints_lines_and_the_plan():
    console = Console(file=io.StringIO(), width=160)

    follow(JobView("fake-1"), numbered(history()), console)

    assert "\x1b" not in console.file.getvalue()
    assert console.file.getvalue().index("plan of epoch 1") < console.file.getvalue().index("predicted:")
