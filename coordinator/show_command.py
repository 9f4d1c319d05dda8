"""``plutino show``: all that is stored of a job, or one of its steps drawn beside its prediction."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from coordinator.command_parts import AsJson, JobIdText, StateDir, local_client, print_json


def show(
    job: JobIdText,
    state_dir: StateDir = None,
    as_json: AsJson = False,
    gantt: Annotated[
        str | None,
        typer.Option(metavar="STEP.SVG", help="Draw a recorded step beside its prediction; - draws it as text."),
    ] = None,
    step: Annotated[int | None, typer.Option(help="Which recorded step; by default the newest.")] = None,
) -> None:
    """Show everything that is stored of a job, or draw one of its steps."""
    if gantt is not None:
        return _draw(job, state_dir, gantt, step, as_json=as_json)
    with local_client(state_dir) as client:
        found = client.job(job)
    if as_json:
        return print_json(found)
    from coordinator.screens import job_detail, make_console

    console = make_console()
    console.print(job_detail(found))
    if (choice := found.detail["spec"].get("auto_method")) is not None:
        console.print(f"method: auto took {choice['why']}", markup=False)


def _draw(job: str, state_dir: Path | None, gantt: str, step: int | None, *, as_json: bool) -> None:
    from coordinator.artifacts.traces import PlannedEpoch
    from coordinator.trace_command import TO_STDOUT, draw_step, write_step
    from partitioner.trace import StepTrace

    with local_client(state_dir) as client:
        trace_json, planned_json = client.trace(job, step)
    trace = StepTrace.model_validate_json(trace_json)
    planned = PlannedEpoch.model_validate_json(planned_json) if planned_json else None
    if as_json:
        print_json(trace.model_dump(mode="json"))
    if gantt != TO_STDOUT:
        write_step(draw_step(trace, planned, as_picture=True), Path(gantt))
    elif not as_json:
        print(draw_step(trace, planned, as_picture=False), end="")
