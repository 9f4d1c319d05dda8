"""Does a published adapter do what the live one does? Answered by running the stage with each."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from edge_node.methods.base import AttachedMethod
from edge_node.stage.passes import StageInput
from edge_node.stage.stage import Stage

_ROWS, _TOKENS = 2, 8


def part_difference(stage: Stage, method: AttachedMethod, published: Mapping[str, Tensor]) -> float:
    """Largest absolute difference of the stage's outputs on a fixed random input, live against published parameters.

    The live parameters are put back before it returns.
    """
    live = method.state()
    with torch.no_grad():
        with_live = _output(stage, method.num_prompt_tokens)
        method.load(published)
        try:
            with_published = _output(stage, method.num_prompt_tokens)
        finally:
            method.load(live)
    differences = [(one - other).abs().max() for one, other in zip(with_live, with_published, strict=True)]
    return float(torch.stack(differences).max())  # torch's maximum keeps what is not a number


def _output(stage: Stage, num_prompt_tokens: int) -> tuple[Tensor, ...]:
    output = stage.run(_probe(stage, num_prompt_tokens))
    if not stage.is_last:
        return tuple(output.tensors.values())
    return (stage.head(output.hidden) if stage.score_head is None else stage.score(output.hidden.flatten(0, 1)),)


def _probe(stage: Stage, num_prompt_tokens: int) -> StageInput:
    generator = torch.Generator().manual_seed(0)
    num_tokens = num_prompt_tokens + _TOKENS
    position_ids = torch.arange(num_tokens).expand(_ROWS, num_tokens)
    if stage.family.halves is not None:
        return _two_texts_probe(stage, position_ids, generator)
    if stage.is_first:
        ids = torch.randint(0, int(stage.config.vocab_size), (_ROWS, _TOKENS), generator=generator)
        return StageInput(position_ids=position_ids, input_ids=ids, num_prompt_tokens=num_prompt_tokens)
    hidden = torch.randn(_ROWS, num_tokens, int(stage.config.hidden_size), generator=generator).to(stage.dtype)
    side = None
    if stage.side is not None and stage.side.reads_side:
        side = torch.randn(_ROWS, num_tokens, stage.side.layout.side_width, generator=generator)
    return StageInput(position_ids=position_ids, hidden=hidden, side=side)


def _two_texts_probe(stage: Stage, position_ids: Tensor, generator: torch.Generator) -> StageInput:
    shape = tuple(position_ids.shape)
    if stage.is_first:
        ids, target_ids = (
            torch.randint(0, int(stage.config.vocab_size), shape, generator=generator) for _ in ("source", "target")
        )
        return StageInput(position_ids=position_ids, input_ids=ids, target_ids=target_ids)
    source, hidden = (
        torch.randn(*shape, int(stage.config.hidden_size), generator=generator).to(stage.dtype)
        for _ in ("source", "target")
    )
    beside: dict[str, Tensor] = {}
    if stage.side is not None:
        read = {"source_side": stage.side.reads_source, "side": stage.side.reads_side}
        beside = {
            name: torch.randn(*shape, stage.side.layout.side_width, generator=generator)
            for name, is_read in read.items()
            if is_read
        }
    side, source_side = beside.get("side"), beside.get("source_side")
    return StageInput(position_ids=position_ids, source=source, hidden=hidden, side=side, source_side=source_side)
