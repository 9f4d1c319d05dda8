"""Which of a stage's parameters take part in a step: top-down unfreezing, pure."""

from __future__ import annotations

import re
from collections.abc import Sequence

from edge_node.methods.base import Role, TrainableParameter
from plutino.families import Family
from plutino.job.assignment import StageShape


def block_of_use(name: str, role: Role, family: Family) -> int | None:
    """The block with which a use of a parameter is unfrozen; None: it is trained from the start.

    What lies below the blocks comes with the lowest of them, what lies above is never frozen.

    Args:
        name: the parameter's global name.
        role: of the use.
        family: of the model.
    """
    if role in ("embedding", "head"):
        return 0 if role == "embedding" else None
    found = re.search(rf"(?:^|\.){re.escape(family.block_prefix)}(\d+)\.", name) or re.fullmatch(r"block (\d+)", role)
    if found:
        return int(found[1])
    return 0 if name.endswith((*family.embedding, *family.optional_embedding)) else None


def is_trained(name: str, roles: Sequence[Role], family: Family, lowest_block: int) -> bool:
    """Whether any of these uses takes part where blocks from ``lowest_block`` on are unfrozen."""
    blocks = (block_of_use(name, role, family) for role in roles)
    return any(block is None or block >= lowest_block for block in blocks)


def freeze_below(parameters: Sequence[TrainableParameter], family: Family, lowest_block: int) -> frozenset[str]:
    """Let the uses below a block take no gradient; gives the names of the parameters that have one all the same.

    A tied table is trained by its head's use while the embedding's is frozen: all its holders apply that.
    """
    for parameter in parameters:
        for role, use in parameter.uses:
            use.requires_grad_(is_trained(parameter.name, (role,), family, lowest_block))
    return frozenset(p.name for p in parameters if is_trained(p.name, p.all_roles, family, lowest_block))


def stage_of_block(block: int, stages: Sequence[StageShape]) -> int:
    """The stage that holds a block."""
    return next(i for i, stage in enumerate(stages) if stage.start_block <= block < stage.end_block)
