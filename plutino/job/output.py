"""Where the result goes."""

from __future__ import annotations

from plutino.job.base import SpecPart


class OutputConfig(SpecPart):
    """The published PEFT adapter."""

    publish: bool = True
    """false: train, evaluate and score, and keep no adapter."""
    dir: str | None = None
    """Folder of the adapter; it must not exist or be an earlier result of the same job. None: under the coordinator's
    state folder. A relative path is taken from the job file's folder."""
