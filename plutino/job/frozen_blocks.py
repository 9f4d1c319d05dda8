"""Up to which block a job's activation cache keeps what frozen blocks give."""

from __future__ import annotations

from plutino.errors import ConfigError
from plutino.families import EMBEDDING_NAMES
from plutino.job.parts import JobParts


def kept_place(spec: JobParts, num_blocks: int) -> int | None:
    """The lowest trained block of a job that keeps its input; None: it keeps nothing, or what every block gives.

    Args:
        spec: the job.
        num_blocks: of its model, an encoder-decoder's counted through.

    Raises:
        ConfigError: the job asks for a cache and trains in the lowest block of a model of so many.
    """
    if spec.training.activation_cache == "off" or spec.method.leaves_blocks_alone:
        return None
    lowest = spec.method.lowest_trained_block(num_blocks, EMBEDDING_NAMES)
    if not lowest:
        raise ConfigError(
            f"training.activation_cache would keep nothing: the model has {num_blocks} blocks and method.type: "
            f"{spec.method.type} trains in the lowest; name fewer in method.blocks, or set the cache to off"
        )
    return lowest
