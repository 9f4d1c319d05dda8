"""The command ``plutino``: starts the coordinator and asks it things.

Commands parse, call one function and print. What costs time to import is imported inside them, so that ``--help``
answers at once. A PlutinoError ends the command with its message on stderr and its class's exit code.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from typer.core import TyperGroup

from coordinator.command_parts import AsJson, JobIdText, StateDir, local_client, print_json
from coordinator.data_command import data_app
from coordinator.evaluate_command import evaluate
from coordinator.llm2llm_command import llm2llm
from coordinator.member_commands import devices_app, token_app
from coordinator.show_command import show
from coordinator.sweep_command import sweep
from coordinator.up_command import up
from plutino.errors import JobError, PlutinoError

if TYPE_CHECKING:
    from plutino.client import Client
    from plutino.job.spec import JobSpec
    from plutino.types import JobId


class _Commands(TyperGroup):
    """Ends with a message and an exit code where a command raises one of our errors."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        """Run a command line; see typer."""
        try:
            return super().main(*args, **kwargs)
        except PlutinoError as error:
            print(f"plutino: {error}", file=sys.stderr)
            sys.exit(error.exit_code)


app = typer.Typer(
    name="plutino",
    cls=_Commands,
    help="Fine-tune one language model over several small, unequal devices.",
    no_args_is_help=True,
    add_completion=False,
    # typer's decorations import rich, which costs more than everything else in --help together.
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

app.command()(up)
app.command()(sweep)
app.command()(show)
app.command()(evaluate)
app.command()(llm2llm)
app.add_typer(data_app, name="data")
app.add_typer(token_app, name="token")
app.add_typer(devices_app, name="devices")

_INTERRUPTED_EXIT_CODE = 130
"""What a shell gives a command that SIGINT ended."""

JobFile = Annotated[Path, typer.Argument(metavar="JOB.YAML", help="The job file, YAML or JSON.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Overrule the job file: training.steps=50. May be repeated."),
]


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
)
def node(context: typer.Context) -> None:
    """Give this device to a coordinator; the same as plutino-node (try: plutino node run --help)."""
    import os

    # A process of its own: the agent must stay small, and neither service may import the other.
    os.execv(sys.executable, [sys.executable, "-m", "edge_node.cli", *context.args])


@app.command()
def plan(
    job_file: JobFile,
    overrides: Overrides = None,
    fleet: Annotated[
        Path | None, typer.Option(metavar="FLEET.YAML", help="Plan for the devices of a file; asks no coordinator.")
    ] = None,
    what_if: Annotated[
        list[str] | None,
        typer.Option(metavar="CHANGE", help="'add 8GiB 2x', 'remove NAME', 'memory NAME 4GiB', 'rate 100Mbit'."),
    ] = None,
    gantt: Annotated[Path | None, typer.Option(metavar="PLAN.SVG", help="Draw the predicted step.")] = None,
    state_dir: StateDir = None,
    as_json: AsJson = False,
) -> None:
    """Show how a job would be split over the devices that are in, or over those of a file; reserves nothing."""
    from coordinator.plan_command import consider, plan_text, plan_values, refused_text, try_changes, write_gantt
    from coordinator.scheduling.problem import PlanningProblem
    from partitioner.plan import Plan
    from plutino.errors import InfeasiblePlanError

    spec = _load_spec(job_file, overrides)
    if fleet is not None:
        from coordinator.jobs.offline_planning import load_fleet, offline_plan

        problem, found = offline_plan(spec, load_fleet(fleet))
    else:
        with local_client(state_dir) as client:
            values, problem_values = client.plan_with_problem(spec, even_if_refused=bool(what_if))
        found = values if isinstance(values, str) else Plan.model_validate(values)
        problem = PlanningProblem.model_validate(problem_values)
    if isinstance(found, str):
        # What a change would give is what a person wants to know who has just been refused.
        if what_if:
            tried = try_changes(problem, what_if)
            print(refused_text(found, tried, as_json=as_json), end="", flush=True)
        raise InfeasiblePlanError(found)
    planned = consider(problem, found, what_if or ())
    if gantt is not None:
        write_gantt(planned, gantt)
    if as_json:
        return print_json(plan_values(planned))
    print(plan_text(planned), end="")


@app.command()
def submit(
    job_file: JobFile,
    overrides: Overrides = None,
    watch: Annotated[bool, typer.Option("--watch/--detach", help="Stay and show the job, or return at once.")] = True,
    state_dir: StateDir = None,
    as_json: AsJson = False,
) -> None:
    """Hand a job in. Ctrl-C while watching detaches; the job goes on."""
    spec = _load_spec(job_file, overrides)
    with local_client(state_dir) as client:
        job_id = client.submit(spec)
        if watch:
            return _watch(client, job_id, state_dir, as_json=as_json)
    if as_json:
        return print_json({"job_id": job_id})
    if spec.auto_method is not None:
        with local_client(state_dir) as client:
            print(f"method: auto takes {client.job(job_id).detail['spec']['auto_method']['why']}")
    print(f"submitted {job_id}; watch it with: {_command('watch', job_id, state_dir)}")


@app.command()
def jobs(state_dir: StateDir = None, as_json: AsJson = False) -> None:
    """List all jobs, oldest first."""
    with local_client(state_dir) as client:
        found = client.jobs()
    if as_json:
        return print_json(found)
    import time

    from coordinator.screens import job_table, make_console

    make_console().print(job_table(found, now_s=time.time()))


@app.command()
def watch(job: JobIdText, state_dir: StateDir = None, as_json: AsJson = False) -> None:
    """Show a job until it has ended. Ctrl-C detaches; the job goes on."""
    with local_client(state_dir) as client:
        _watch(client, client.job(job).summary.job_id, state_dir, as_json=as_json)


@app.command()
def pause(job: JobIdText, state_dir: StateDir = None, as_json: AsJson = False) -> None:
    """Stop a running job between two steps; it keeps its memory."""
    _change(job, state_dir, lambda client, job_id: client.pause(job_id), as_json=as_json)


@app.command()
def resume(job: JobIdText, state_dir: StateDir = None, as_json: AsJson = False) -> None:
    """Let a paused job go on."""
    _change(job, state_dir, lambda client, job_id: client.resume(job_id), as_json=as_json)


@app.command()
def cancel(job: JobIdText, state_dir: StateDir = None, as_json: AsJson = False) -> None:
    """End a job and free everything it holds."""
    _change(job, state_dir, lambda client, job_id: client.cancel(job_id), as_json=as_json)


@app.command()
def merge(
    adapter_dir: Annotated[Path, typer.Argument(metavar="ADAPTER_DIR", help="A published LoRA adapter.")],
    out: Annotated[Path, typer.Option(help="Folder for the merged model; must not exist yet.")],
    base: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where the base model lies, if not where the adapter says.")
    ] = None,
    shard_size: Annotated[str, typer.Option(metavar="SIZE", help="Bound on one file of weights.")] = "5GB",
    as_json: AsJson = False,
) -> None:
    """Fold a LoRA adapter into its base model, tensor by tensor: a plain transformers folder."""
    from coordinator.artifacts.merge import describe, merge_adapter
    from plutino.sizes import parse_size

    merged = merge_adapter(adapter_dir, out.resolve(), base_dir=base, max_shard_bytes=parse_size(shard_size))
    if as_json:
        return print_json(merged)
    print(describe(merged))


@app.command()
def doctor(
    state_dir: StateDir = None,
    engine: Annotated[Literal["ray", "local"], typer.Option(help="As for up; local leaves Ray out.")] = "ray",
    as_json: AsJson = False,
) -> None:
    """Examine this machine and the devices that are in; on a device: plutino node doctor."""
    from coordinator.doctor import DoctorOptions, examine_coordinator
    from plutino.doctor.report import as_json as report_json
    from plutino.doctor.report import as_text, exit_code
    from plutino.endpoint import default_state_dir

    findings = examine_coordinator(DoctorOptions(state_dir=state_dir or default_state_dir(), has_ray=engine == "ray"))
    print(report_json(findings) if as_json else as_text(findings))
    raise typer.Exit(exit_code(findings))


@app.command()
def demo(
    task: Annotated[
        Literal["intent", "json"], typer.Option(help="What an utterance wants, as a name, or with its details as JSON.")
    ] = "intent",
    out: Annotated[Path, typer.Option(help="Folder for result.json and the adapter.")] = Path("runs/demo"),
    engine: Annotated[Literal["ray", "local"], typer.Option(help="As for up.")] = "ray",
    keep: Annotated[bool, typer.Option("--keep", help="Keep the demo's state folder with all logs.")] = False,
    fast: Annotated[bool, typer.Option("--fast", help="A few steps only: see it move, expect nothing.")] = False,
    seed: Annotated[int, typer.Option(min=0, help="Of adapters and data order.")] = 0,
    quantization: Annotated[
        Literal["none", "int8", "nf4", "int4"], typer.Option(help="How the devices hold the frozen weights.")
    ] = "nf4",
    as_json: AsJson = False,
) -> None:
    """Fine-tune the bundled model over three devices made of processes on this machine, and compare."""
    from coordinator.demo.demo import DemoOptions, run_demo

    options = DemoOptions(
        task=task,
        out_dir=out,
        engine=engine,
        keep=keep,
        is_fast=fast,
        is_quiet=as_json,
        seed=seed,
        quantization=quantization,
    )
    try:
        result = run_demo(options)
    except KeyboardInterrupt:
        print("\nthe demo was stopped; nothing of it is left running", file=sys.stderr)
        raise typer.Exit(_INTERRUPTED_EXIT_CODE) from None
    if as_json:
        print_json(result)


@app.command()
def version(as_json: AsJson = False) -> None:
    """Print the version of plutino."""
    from importlib.metadata import PackageNotFoundError
    from importlib.metadata import version as installed_version

    try:
        number = installed_version("plutino")
    except PackageNotFoundError:
        number = "unknown: running from a source tree that is not installed"
    if as_json:
        return print_json({"version": number})
    print(f"plutino {number}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of the command; ends the process."""
    app(args=None if arguments is None else list(arguments), prog_name="plutino")


def _load_spec(job_file: Path, overrides: list[str] | None) -> JobSpec:
    from plutino.job.spec import load_spec

    return load_spec(job_file, overrides or ())


def _command(name: str, job_id: JobId, state_dir: Path | None) -> str:
    return f"plutino {name} {job_id}" + (f" --state-dir {state_dir}" if state_dir is not None else "")


def _change(job: str, state_dir: Path | None, change: Callable[[Client, JobId], str], *, as_json: bool) -> None:
    """Tell a job to change its state, and print the new one."""
    with local_client(state_dir) as client:
        job_id = client.job(job).summary.job_id
        state = change(client, job_id)
    if as_json:
        return print_json({"job_id": job_id, "state": state})
    print(f"{job_id} is {state}")


def _watch(client: Client, job_id: JobId, state_dir: Path | None, *, as_json: bool) -> None:
    """Show a job to its end.

    Raises:
        JobError: the job failed or was cancelled.
    """
    from coordinator.job_view import JobView
    from coordinator.screens import follow, make_console, summary

    view = JobView(job_id)
    try:
        if as_json:
            for numbered in client.watch(job_id):
                view.take(numbered)
                print_json(numbered)
        else:
            console = make_console()
            follow(view, client.watch(job_id), console)
            console.print(summary(view))
    except KeyboardInterrupt:
        # Not a failure of anything: exit code 0.
        print(
            f"\ndetached; {job_id} goes on. Attach again: {_command('watch', job_id, state_dir)}\n"
            f"End it: {_command('cancel', job_id, state_dir)}",
            file=sys.stderr,
        )
        return
    if view.state != "succeeded":
        raise JobError(f"{job_id} is {view.state}: {view.reason}")


if __name__ == "__main__":
    main()
