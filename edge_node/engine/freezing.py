"""Which of a stage's parameters take part in a step: top-down unfreezing, pure."""

from __future__ import annotations

import re
from collections.abc import Sequence

from edge_node.methods.base import Role, TrainableParameter
from plutino.families import Family
from plutino.job.assignment import StageShape


def block_of_use(name: str, role: Role, family: Family, num_encoder_blocks: int = 0) -> int | None:
    """The block with which a use of a parameter is unfrozen; None: it is trained from the start.

    What lies below the blocks comes with the lowest of them, what lies above is never frozen. What stands between an
    encoder-decoder's halves comes with the block that it stands behind or before.

    Args:
        name: the parameter's global name.
        role: of the use.
        family: of the model.
        num_encoder_blocks: of an encoder-decoder, whose decoder's blocks are counted behind them.
    """
    if role in ("embedding", "head"):
        return 0 if role == "embedding" else None
    if found := re.fullmatch(r"block (\d+)", role):
        return int(found[1])
    prefixes = {family.block_prefix: 0}
    if family.halves is not None:
        if any(prefix in name for prefix in family.halves.encoder_final):
            return num_encoder_blocks - 1
        if name.endswith(family.halves.decoder_entry):
            return num_encoder_blocks
        prefixes[family.halves.decoder_prefix] = num_encoder_blocks
    for prefix, first in prefixes.items():
        if found := re.search(rf"(?:^|\.){re.escape(prefix)}(\d+)\.", name):
            return first + int(found[1])
    return 0 if name.endswith((*family.embedding, *family.optional_embedding)) else None


def freeze_below(
    parameters: Sequence[TrainableParameter], family: Family, lowest_block: int, num_encoder_blocks: int = 0
) -> frozenset[str]:
    """Let the uses below a block take no gradient; gives the names of the parameters that have one all the same.

    A tied table is trained by its head's use while the embedding's is frozen: all its holders apply that.
    """

    def is_trained(name: str, roles: Sequence[Role]) -> bool:
        blocks = (block_of_use(name, role, family, num_encoder_blocks) for role in roles)
        return any(block is None or block >= lowest_block for block in blocks)

    for parameter in parameters:
        for role, use in parameter.uses:
            use.requires_grad_(is_trained(parameter.name, (role,)))
    return frozenset(p.name for p in parameters if is_trained(p.name, p.all_roles))


def stage_of_block(block: int, stages: Sequence[StageShape]) -> int:
    """The stage that holds a block."""
    return next(i for i, stage in enumerate(stages) if stage.start_block <= block < stage.end_block)
