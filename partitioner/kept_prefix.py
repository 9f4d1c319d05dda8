"""What later epochs still read, send and embed where the activation cache keeps what frozen blocks give.

The cache keeps what the lowest trained block gets. Where that is one of an encoder-decoder's decoder, it keeps the
encoder's output beside it; where it is one of the encoder, the first stage still embeds every target, and the
embeddings pass the borders below it, because the decoder begins with them.
"""

from __future__ import annotations

from partitioner.activations import target_tokens
from partitioner.cached_epoch import READ_BYTES_PER_S
from partitioner.model import ModelTable
from partitioner.shape import JobShape


def keeps_source(table: ModelTable, shape: JobShape) -> bool:
    """Whether an encoder's output is kept beside what the lowest trained block gets."""
    return shape.first_trainable_block >= table.num_encoder_blocks > 0


def kept_row_tokens(table: ModelTable, shape: JobShape) -> int:
    """Tokens whose states are kept of the longest row; an encoder-decoder's texts may be two rows' longest."""
    return shape.row_tokens + (target_tokens(shape) if keeps_source(table, shape) else 0)


def read_s(table: ModelTable, shape: JobShape) -> float:
    """Seconds in which what is kept of a micro-batch comes from a disk."""
    num_bytes = shape.micro_batch_rows * kept_row_tokens(table, shape) * shape.entry_token_bytes
    return num_bytes / READ_BYTES_PER_S


def embedded_share(table: ModelTable, shape: JobShape) -> float:
    """Share of a micro-batch's tokens that later epochs embed and send over borders below the lowest trained block."""
    if shape.first_trainable_block >= table.num_encoder_blocks:
        return 0.0
    return target_tokens(shape) / (shape.row_tokens + target_tokens(shape))
