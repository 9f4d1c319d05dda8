"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

StateDir = Annotated[
    Path | None,
    typer.Option("--state-dir", help="The coordinator's folder; by default plutino in the user's state directory."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]
