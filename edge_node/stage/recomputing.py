"""Blocks that drop their activations and recompute them in the backward pass (Chen et al. 2016, arXiv:1604.06174)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import Cache

from edge_node.methods.dropout import current_dropout_position, restored_dropout_position
from edge_node.stage.past import FixedPast


def recompute(block: nn.Module) -> None:
    """Make a block recompute.

    Its ``forward`` is replaced on the instance: a wrapper module would change the names of all its parameters.
    """
    forward: Callable[..., Any] = block.forward

    def forward_with_checkpointing(*args: Any, **kwargs: Any) -> Any:
        # One that grows would grow a second time.
        has_growing_cache = any(
            isinstance(value, Cache) and not isinstance(value, FixedPast) for value in (*args, *kwargs.values())
        )
        if has_growing_cache or not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        position = current_dropout_position()

        def again(*args: Any, **kwargs: Any) -> Any:
            # The backward pass may run in another thread and while another micro-batch's position is set.
            with restored_dropout_position(position):
                return forward(*args, **kwargs)

        # The backbone draws no random numbers and dropout is seeded by position: no generator state to keep.
        return checkpoint(again, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

    block.forward = forward_with_checkpointing


@contextmanager
def recomputing(block: nn.Module) -> Iterator[None]:
    """What a block that recomputes runs forward within this, it recomputes; afterwards the block is as it was."""
    forward = block.forward
    recompute(block)
    try:
        yield
    finally:
        block.forward = forward
