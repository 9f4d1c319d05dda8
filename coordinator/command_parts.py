"""What several commands share: options, the client of this machine's coordinator, printing JSON."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from plutino.client import Client

StateDir = Annotated[
    Path | None,
    typer.Option("--state-dir", help="The coordinator's folder; by default plutino in the user's state directory."),
]
JobIdText = Annotated[str, typer.Argument(metavar="JOB", help="A job's id, or its beginning.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]


def local_client(state_dir: Path | None) -> Client:
    """A client of the coordinator whose folder this is."""
    from plutino.client import Client

    return Client.local(state_dir)


def print_json(value: Any) -> None:
    """One document on one line of its own, at once: programs read it while the command goes on."""
    from coordinator.json_output import to_json

    print(to_json(value), flush=True)
