"""How busy a relay's processes were, so that a reader sees whether the emulator was the limit and not the links."""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from pathlib import Path

_ROW = struct.Struct("=ddqq")


@dataclass(frozen=True, slots=True, kw_only=True)
class RelayUse:
    """What a carrier did since it began."""

    processor_s: float
    busiest_share: float
    """Of one processor, over its busiest second."""
    num_bytes: int
    num_late_bytes: int
    """Sent on more than a millisecond after they were due, though whoever receives had room for them."""


def write_use(path: Path, row: int, use: RelayUse) -> None:
    """Put a carrier's figures into its row of the file."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT, 0o600)
    try:
        os.pwrite(descriptor, _ROW.pack(*astuple(use)), row * _ROW.size)
    finally:
        os.close(descriptor)


def read_use(path: Path) -> list[RelayUse]:
    """Every carrier's figures, up to a second old; none if nothing was written yet."""
    data = path.read_bytes() if path.is_file() else b""
    names = ("processor_s", "busiest_share", "num_bytes", "num_late_bytes")
    return [RelayUse(**dict(zip(names, row, strict=True))) for row in _ROW.iter_unpack(data)]


def use_note(before: Sequence[RelayUse], after: Sequence[RelayUse], wall_s: float, num_cores: int) -> str:
    """What happened between two looks, in a sentence.

    Args:
        before: each carrier's figures then; a carrier that had none yet had done nothing.
        after: each carrier's figures now.
        wall_s: between them.
        num_cores: processors that the carriers may use.
    """
    processor_s = sum(use.processor_s for use in after) - sum(use.processor_s for use in before)
    num_bytes = sum(use.num_bytes for use in after) - sum(use.num_bytes for use in before)
    num_late = sum(use.num_late_bytes for use in after) - sum(use.num_late_bytes for use in before)
    busiest = max((use.busiest_share for use in after), default=0.0)
    return (
        f"the links' emulator had {num_cores} processors and {len(after)} processes: {processor_s / wall_s:.2f}"
        f" processors busy, one process at most {busiest:.0%} of a second; of {num_bytes / 1e6:.0f} MB"
        f" {num_late / max(1, num_bytes):.1%} went on over 1 ms late"
    )
