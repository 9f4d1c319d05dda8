"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

StateDir = Annotated[
    Path | None,
    typer.Option("--state-dir", help="The coordinator's folder; by default plutino in the user's state directory."),
]
JobIdText = Annotated[str, typer.Argument(metavar="JOB", help="A job's id, or its beginning.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]
