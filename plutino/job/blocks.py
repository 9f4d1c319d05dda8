"""Which blocks of a model a method trains in, as jobs say it: a list, a range, or so many of the last ones."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from plutino.errors import ConfigError

LastBlocks = Annotated[str, Field(pattern=r"^last [1-9][0-9]*$")]
"""``last 4``: the four blocks below the head."""


def _spelled_out(value: Any) -> Any:
    """A range as the list that it stands for; anything else as it is."""
    found = re.fullmatch(r"(\d+)-(\d+)", value.strip()) if isinstance(value, str) else None
    if found is None:
        return value
    first, last = int(found[1]), int(found[2])
    if last < first:
        raise ValueError(f"blocks {value} names none: the lower number comes first")
    return tuple(range(first, last + 1))


Blocks = Annotated[tuple[int, ...] | LastBlocks | None, BeforeValidator(_spelled_out)]
"""``[8, 9, 11]``, ``8-11`` (which stands for 8, 9, 10, 11) or ``last 4``; None: all blocks."""


def chosen_blocks(blocks: Sequence[int] | str | None, num_blocks: int) -> tuple[int, ...]:
    """The blocks that a job means, ascending.

    Raises:
        ConfigError: one of them does not exist, or none was named.
    """
    if blocks is None:
        return tuple(range(num_blocks))
    if isinstance(blocks, str):
        number = int(blocks.removeprefix("last "))
        if number > num_blocks:
            raise ConfigError(f"method.blocks is {blocks} but the model has {num_blocks}; leave it out to mean all")
        return tuple(range(num_blocks - number, num_blocks))
    if not blocks or not all(0 <= block < num_blocks for block in blocks):
        raise ConfigError(
            f"method.blocks is {list(blocks)} but the blocks are 0 to {num_blocks - 1}; leave it out to mean all"
        )
    return tuple(sorted(set(blocks)))
