"""Memory sizes as people write them: ``600MiB``, ``1.5GiB``."""

from __future__ import annotations

import re

from plutino.errors import ConfigError

KIB = 1024
MIB = 1024 * KIB
GIB = 1024 * MIB

SMALLEST_MAPPING_BYTES = 256 * KIB
"""Blocks from this size on have mappings of their own in a worker that starts; smaller ones lie on its heap."""

_UNITS: dict[str, int] = {
    "b": 1,
    "kib": KIB,
    "mib": MIB,
    "gib": GIB,
    "tib": 1024 * GIB,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
}
_SIZE = re.compile(r"(?P<number>\d+(?:\.\d+)?)\s*(?P<unit>[a-z]+)", re.IGNORECASE | re.ASCII)


def parse_size(text: str) -> int:
    """Bytes of a size with its unit: KiB, MiB, GiB, TiB (powers of 1024), kB, MB, GB, TB (powers of 1000) or B.

    Raises:
        ConfigError: no unit, an unknown one, or less than one byte.
    """
    match = _SIZE.fullmatch(text.strip())
    factor = _UNITS.get(match["unit"].lower()) if match else None
    if match is None or factor is None:
        raise ConfigError(f"{text!r} is not a size; write a number and a unit, such as 600MiB or 1.5GiB")
    whole, _, fraction = match["number"].partition(".")
    # In integers: a float would lose bytes above 8 PiB and could become infinite.
    size_bytes = int(whole) * factor + (int(fraction) * factor // 10 ** len(fraction) if fraction else 0)
    if size_bytes < 1:
        raise ConfigError(f"{text!r} is less than one byte; write a size such as 600MiB")
    return size_bytes


def format_size(size_bytes: int) -> str:
    """A size for a person, in the largest binary unit that keeps it at 1 or more: ``600 MiB``, ``1.5 GiB``."""
    for unit, factor in (("TiB", 1024 * GIB), ("GiB", GIB), ("MiB", MIB), ("KiB", KIB)):
        if abs(size_bytes) >= factor:
            return f"{f'{size_bytes / factor:.1f}'.removesuffix('.0')} {unit}"
    return f"{size_bytes} B"
