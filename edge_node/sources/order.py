"""Which source a tensor is asked of first: a pure decision from what the sources have delivered so far."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

MEASURED_BYTES = 4 << 20
"""A source that has delivered less is not judged by its speed."""
MUCH_FASTER = 2.0
"""A later source goes before an earlier one only if it is so many times faster: speeds of one link vary by less."""


@dataclass(frozen=True, slots=True)
class Delivered:
    """What one source has given so far."""

    num_bytes: int = 0
    seconds: float = 0.0
    """Time in which it was delivering, summed over its streams."""

    def plus(self, num_bytes: int, seconds: float) -> Delivered:
        """The sum."""
        return Delivered(self.num_bytes + num_bytes, self.seconds + seconds)

    @property
    def bytes_per_s(self) -> float | None:
        """Speed of one stream; None before there is enough to tell."""
        return self.num_bytes / self.seconds if self.num_bytes >= MEASURED_BYTES and self.seconds > 0 else None


def order_sources(preferred: Sequence[str], delivered: Mapping[str, Delivered]) -> list[str]:
    """Sources in the order in which they are asked for the next tensor.

    The preferred order holds (the coordinator last: its link is everybody's) until a source has shown that it is much
    slower than a later one. Once the first has been measured, a later one that has not is tried with one tensor; that
    is how it can show it.
    """
    order = list(preferred)
    if len(order) > 1 and _speed(order[0], delivered) is not None:
        for name in order[1:]:
            if name not in delivered:
                return [name, *(other for other in order if other != name)]
    ranked: list[str] = []
    for name in order:
        place = len(ranked)
        speed = _speed(name, delivered)
        while speed is not None and place > 0:
            earlier = _speed(ranked[place - 1], delivered)
            if earlier is None or speed < MUCH_FASTER * earlier:
                break
            place -= 1
        ranked.insert(place, name)
    return ranked


def _speed(name: str, delivered: Mapping[str, Delivered]) -> float | None:
    return delivered[name].bytes_per_s if name in delivered else None
