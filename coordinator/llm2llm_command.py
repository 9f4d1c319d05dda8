"""``plutino llm2llm``: hands a loop in, or attaches to one, and shows its rounds until it has ended."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from coordinator.command_parts import AsJson, StateDir, local_client, print_json
from plutino.errors import ConfigError, JobError

if TYPE_CHECKING:
    from plutino.client import Client
    from plutino.llm2llm import LoopStatus

_LOOK_EVERY_S = 1.0


def llm2llm(
    loop: Annotated[str, typer.Argument(metavar="LOOP.YAML|LOOP", help="A loop file, or a loop's id to attach to.")],
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Overrule its job file, as for submit."),
    ] = None,
    watch: Annotated[bool, typer.Option("--watch/--detach", help="Stay and show it, or return at once.")] = True,
    rows: Annotated[bool, typer.Option("--rows", help="Print every row that the teacher wrote, kept or not.")] = False,
    cancel: Annotated[bool, typer.Option("--cancel", help="End the loop; everything that it has stays.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a loop that failed or was cancelled.")] = False,
    state_dir: StateDir = None,
    as_json: AsJson = False,
) -> None:
    """Train, let a teacher write rows like those that were got wrong, train anew. Ctrl-C detaches; the loop goes on."""
    with local_client(state_dir) as client:
        if Path(loop).is_file():
            if rows or cancel or resume:
                raise ConfigError("--rows, --cancel and --resume are for a loop's id; give that in place of a file")
            from plutino.llm2llm import load_loop

            loop_id = client.loops.submit(load_loop(Path(loop), overrides or ()))
        else:
            if overrides:
                raise ConfigError(f"there is no loop file {loop}; give one, or a loop's id without --set")
            loop_id = client.loops.status(loop).loop_id
            if rows:
                return _print_rows(client, loop_id)
            if cancel:
                return _tell(client.loops.cancel(loop_id), as_json=as_json)
            if resume:
                client.loops.resume(loop_id)
        if not watch:
            return _tell(client.loops.status(loop_id), as_json=as_json)
        ended = _follow(client, loop_id, as_json=as_json)
    if ended is not None and ended.state != "succeeded":
        raise JobError(f"loop {loop_id} is {ended.state}: {ended.reason}")


def _follow(client: Client, loop_id: str, *, as_json: bool) -> LoopStatus | None:
    """Show a loop to its end; None if the person went away before."""
    from coordinator.llm2llm.table import round_lines

    told = 0
    try:
        while not (status := client.loops.status(loop_id)).has_ended:
            if not as_json:
                lines = round_lines(status)
                print("\n".join(lines[told:]), end="\n" if lines[told:] else "", flush=True)
                told = len(lines)
            time.sleep(_LOOK_EVERY_S)
    except KeyboardInterrupt:
        print(f"\ndetached; {loop_id} goes on. Attach again: plutino llm2llm {loop_id}", file=sys.stderr)
        return None
    _tell(status, as_json=as_json)
    return status


def _print_rows(client: Client, loop_id: str) -> None:
    """One JSON object on each line, whether or not JSON was asked for: rows have columns of their own."""
    for sample in client.loops.samples(loop_id):
        print_json(sample)


def _tell(status: LoopStatus, *, as_json: bool) -> None:
    if as_json:
        return print_json(status)
    from coordinator.llm2llm.table import loop_table
    from coordinator.screens import make_console

    make_console().print(loop_table(status))
