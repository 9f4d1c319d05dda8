"""``plutino sweep``: hands a sweep in, or attaches to one, and shows its table until it has ended."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from coordinator.command_parts import AsJson, StateDir, local_client, print_json
from plutino.errors import ConfigError, JobError, UnreachableError

if TYPE_CHECKING:
    from plutino.client import Client
    from plutino.sweep import SweepStatus

_LOOK_EVERY_S = 1.0


def sweep(
    job: Annotated[str, typer.Argument(metavar="JOB.YAML|SWEEP", help="A job file, or a sweep's id to attach to.")],
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=V,V", help="method=lora,prompt, training.lr=1e-3,3e-3; may be repeated."),
    ] = None,
    halving: Annotated[
        bool, typer.Option("--halving", help="Short jobs first, longer ones for the best third.")
    ] = False,
    eta: Annotated[int, typer.Option(min=2, help="With --halving: of so many trials one goes on.")] = 3,
    min_steps: Annotated[int, typer.Option(min=1, help="With --halving: no job has fewer steps.")] = 10,
    watch: Annotated[bool, typer.Option("--watch/--detach", help="Stay and show it, or return at once.")] = True,
    cancel: Annotated[bool, typer.Option("--cancel", help="End the sweep; what was measured stays.")] = False,
    state_dir: StateDir = None,
    as_json: AsJson = False,
) -> None:
    """Compare methods and settings over one base model, and recommend one. Ctrl-C detaches; the sweep goes on."""
    with local_client(state_dir) as client:
        if not Path(job).is_file():
            if settings or halving:
                raise ConfigError(f"there is no job file {job}; give one, or a sweep's id without --set")
            found = client.sweeps.status(job)
            if cancel:
                return _tell(client.sweeps.cancel(found.sweep_id), as_json=as_json)
            sweep_id = found.sweep_id
        else:
            sweep_id = client.sweeps.submit(_spec(Path(job), settings or [], eta if halving else None, min_steps))
        if not watch:
            return _tell(client.sweeps.status(sweep_id), as_json=as_json)
        ended = _follow(client, sweep_id, as_json=as_json)
    if ended is not None and ended.state != "succeeded":
        raise JobError(f"sweep {sweep_id} is {ended.state}: {ended.reason}")


def _spec(job_file: Path, settings: list[str], eta: int | None, min_steps: int) -> Any:
    from coordinator.sweeps.grid import expand
    from plutino.sweep import Halving, SweepSpec

    trials = expand(job_file, settings)
    halving = None if eta is None else Halving(eta=eta, min_steps=min_steps)
    return SweepSpec(name=trials[0].spec.name, trials=trials, halving=halving)


def _follow(client: Client, sweep_id: str, *, as_json: bool) -> SweepStatus | None:
    """Show a sweep to its end; None if the person went away before."""
    try:
        if as_json:
            return _until_ended(client, sweep_id, lambda status: None, last=print_json)
        from coordinator.screens import make_console
        from coordinator.sweeps.table import progress, sweep_table

        console = make_console()
        if not console.is_terminal:
            told: set[str] = set()

            def tell(status: SweepStatus) -> None:
                for line in progress(status):
                    if line not in told:
                        told.add(line)
                        console.print(line, markup=False, soft_wrap=True)

            return _until_ended(client, sweep_id, tell, last=lambda status: console.print(sweep_table(status)))
        from rich.live import Live

        # Drawn when it is looked at: four times a second would cost devices on this machine their processor.
        with Live(console=console, auto_refresh=False) as live:

            def draw(status: SweepStatus) -> None:
                live.update(sweep_table(status), refresh=True)

            return _until_ended(client, sweep_id, draw, last=lambda status: None)
    except UnreachableError as error:
        raise UnreachableError(f"{error}. Then attach again: plutino sweep {sweep_id}") from error
    except KeyboardInterrupt:
        print(f"\ndetached; {sweep_id} goes on. Attach again: plutino sweep {sweep_id}", file=sys.stderr)
        return None


def _until_ended(
    client: Client, sweep_id: str, tell: Callable[[SweepStatus], None], *, last: Callable[[SweepStatus], None]
) -> SweepStatus:
    while True:
        status = client.sweeps.status(sweep_id)
        tell(status)
        if status.has_ended:
            last(status)
            return status
        time.sleep(_LOOK_EVERY_S)


def _tell(status: SweepStatus, *, as_json: bool) -> None:
    if as_json:
        return print_json(status)
    from coordinator.screens import make_console
    from coordinator.sweeps.table import sweep_table

    make_console().print(sweep_table(status))
