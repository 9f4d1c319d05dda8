"""Writing files and folders so that they survive a power cut."""

from __future__ import annotations

import os
from pathlib import Path


def write_durable(path: Path, data: bytes) -> None:
    """Write a file, replacing what is there, and wait until its bytes are on the disk.

    The name is durable only after :func:`sync_dir` of its folder.
    """
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync_dir(folder: Path) -> None:
    """Wait until a folder's names, renames and removals are on the disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
