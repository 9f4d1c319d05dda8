"""Stages one after the other in one process, and batches to send through them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from edge_node.stage.architecture import make_position_ids
from edge_node.stage.build import build_stage
from edge_node.stage.passes import StageInput
from edge_node.stage.stage import Stage
from edge_node.stage.weights import LocalSource
from plutino.families import family_of

CUTS: dict[int, tuple[int, ...]] = {1: (0, 4), 2: (0, 1, 4), 3: (0, 1, 3, 4)}
"""Block borders by number of stages; unequal on purpose."""


@dataclass(frozen=True)
class Batch:
    input_ids: Tensor
    attention_mask: Tensor | None
    segment_ids: Tensor | None
    position_ids: Tensor

    @property
    def model_inputs(self) -> dict[str, Any]:
        """The same batch for a plain transformers model, which finds packed rows by their positions."""
        return {
            "input_ids": self.input_ids,
            "attention_mask": self.attention_mask,
            "position_ids": self.position_ids,
            "use_cache": False,
        }


def make_batch(kind: str, *, family: str = "llama") -> Batch:
    """Two rows of 9 tokens: kind is full, right (padding), left (padding) or packed."""
    ids = torch.randint(2, 61, (2, 9), generator=torch.Generator().manual_seed(3))
    mask = segments = None
    if kind in ("right", "left"):
        mask = torch.ones(2, 9, dtype=torch.long)
        mask[1, slice(5, None) if kind == "right" else slice(0, 4)] = 0
        ids = ids * mask
    if kind == "packed":
        segments = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 2, 2], [0, 1, 1, 1, 1, 1, 1, 1, 1]])
    return Batch(ids, mask, segments, make_position_ids(family_of(family), mask, segments, (2, 9)))


def build_chain(model_dir: Path, num_stages: int, **options: Any) -> list[Stage]:
    options = {"dtype": torch.float32} | options
    source = LocalSource(model_dir)
    return [build_stage(source, start, end, **options) for start, end in pairwise(CUTS[num_stages])]


@cache
def frozen_chain(model_dir: Path, num_stages: int, **options: Any) -> list[Stage]:
    """A chain for tests that leave it as it is: without adapters stages have no state."""
    return build_chain(model_dir, num_stages, **options)


def run_chain(stages: list[Stage], batch: Batch, caches: list[Any] | None = None) -> tuple[Tensor, Callable[[], None]]:
    """Logits [B, T, V], and what carries the gradient back over the boundaries after ``logits.backward``.

    Hidden states are detached between stages, as they are by a wire.
    """
    hidden: Tensor | None = None
    boundaries: list[tuple[Tensor, Tensor]] = []
    for index, stage in enumerate(stages):
        sent = hidden
        hidden = sent.detach().requires_grad_(sent.requires_grad) if sent is not None else None
        if sent is not None and hidden is not None and sent.requires_grad:
            boundaries.append((sent, hidden))
        hidden = stage.forward(
            StageInput(
                position_ids=batch.position_ids,
                input_ids=batch.input_ids if stage.is_first else None,
                hidden=hidden,
                attention_mask=batch.attention_mask,
                segment_ids=batch.segment_ids,
                cache=caches[index] if caches else None,
            )
        )
    assert hidden is not None

    def backward_over_boundaries() -> None:
        for sent, received in reversed(boundaries):
            sent.backward(received.grad)

    return stages[-1].head(hidden), backward_over_boundaries
