"""Dropout whose masks depend on where in the job they are drawn and on nothing else.

A mask is a function of (seed, step, micro-batch, module name), so that no partition, no recomputation and no other draw
changes it. The executor names the place with :func:`dropout_position`; outside of it, in evaluation and generation,
dropout does nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from edge_node.methods.seeding import seeded_generator


@dataclass(frozen=True, slots=True)
class DropoutPosition:
    """Where in the job masks are being drawn."""

    seed: int
    step: int
    micro_batch: int


# Per thread: the autograd engine's threads and other workers' threads must not see this one's position.
_position: ContextVar[DropoutPosition | None] = ContextVar("dropout_position", default=None)


@contextmanager
def dropout_position(*, seed: int, step: int, micro_batch: int) -> Iterator[None]:
    """Let dropout draw the masks of one micro-batch's forward pass."""
    with restored_dropout_position(DropoutPosition(seed, step, micro_batch)):
        yield


def current_dropout_position() -> DropoutPosition | None:
    """The position set in this thread; None: dropout is off."""
    return _position.get()


@contextmanager
def restored_dropout_position(position: DropoutPosition | None) -> Iterator[None]:
    """Set a position that :func:`current_dropout_position` gave earlier, for a recomputation."""
    token = _position.set(position)
    try:
        yield
    finally:
        _position.reset(token)


class SeededDropout(nn.Module):
    """Inverted dropout (Srivastava et al. 2014, JMLR 15) with masks from the current position and a name.

    It ignores training mode, because a frozen backbone is always in evaluation mode.

    Args:
        p: share of elements set to zero, 0 <= p < 1.
        name: global name of the layer whose input is dropped.
    """

    def __init__(self, p: float, name: str) -> None:
        super().__init__()
        self.p = p
        self.name = name

    @property
    def is_active(self) -> bool:
        """Whether the next call drops anything."""
        return self.p > 0 and _position.get() is not None

    def forward(self, x: Tensor) -> Tensor:
        """Drop elements of ``x``, of any shape, and scale the others by 1 / (1 - p)."""
        position = _position.get()
        if position is None or self.p == 0:
            return x
        generator = seeded_generator(position.seed, position.step, position.micro_batch, self.name)
        # Uniform draws rather than bernoulli_: that one takes another algorithm where MKL is present.
        dropped = (torch.rand(x.shape, generator=generator) < self.p).to(x.device)
        # The backward pass keeps the mask alone, one byte an element.
        return x.masked_fill(dropped, 0.0) * (1.0 / (1.0 - self.p))

    def extra_repr(self) -> str:
        """Arguments, for the model's printed form."""
        return f"p={self.p}, name={self.name}"
