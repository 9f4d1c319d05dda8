"""Summing the gradients of parameters that several workers hold, in an order that no partition changes.

Three things make a parameter shared: a tied embedding is used by the first and by the last stage, what several blocks
use by all their stages, and a stage with replicas splits its micro-batches among them. Floating-point sums depend on
their order, so the order is fixed by what is summed and never by who holds it: over roles (embedding, then head; block
after block), and within a role over micro-batches 0, 1, 2, ... A replica therefore hands over its micro-batches'
gradients one by one; a role that one worker runs alone hands over its sum, which is the same fold.

The first holder adds up and sends the total to the others: :func:`plan_groups` says who, :func:`reduce_group` does it.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from edge_node.methods.base import Role, TrainableParameter
from edge_node.transport.base import MessageKey, MessageKind, Peer, Transport
from plutino.job.assignment import StageShape
from plutino.types import Unit

Contributions = dict[tuple[Role, int], Tensor]
"""Gradients of one parameter by role and micro-batch; micro-batch -1 stands for the fold over all of them."""

FOLDED = -1


@dataclass(frozen=True, slots=True)
class Group:
    """Parameters with the same holders."""

    holders: tuple[Peer, ...]
    names: tuple[str, ...]

    @property
    def key(self) -> int:
        """A number that all holders compute alike."""
        return zlib.crc32(repr((self.holders, self.names)).encode())


def stage_of_role(role: Role, own_stage_index: int, stages: Sequence[StageShape]) -> int:
    """The stage that has a parameter's use."""
    kind, _, block = role.partition(" ")
    if block:
        return next(i for i, stage in enumerate(stages) if stage.start_block <= int(block) < stage.end_block)
    return {"embedding": 0, "head": len(stages) - 1}.get(kind, own_stage_index)


def plan_groups(
    parameters: Sequence[TrainableParameter], stages: Sequence[StageShape], me: Peer
) -> tuple[tuple[Group, ...], frozenset[str]]:
    """Groups of this worker's shared parameters, and the names of all of them."""
    by_holders: dict[tuple[Peer, ...], list[str]] = {}
    for parameter in parameters:
        held_by = sorted({stage_of_role(role, me.stage_index, stages) for role in parameter.all_roles})
        holders = tuple(Peer(s, r) for s in held_by for r in range(stages[s].num_replicas))
        if len(holders) > 1:
            by_holders.setdefault(holders, []).append(parameter.name)
    groups = tuple(Group(holders, tuple(sorted(names))) for holders, names in sorted(by_holders.items(), key=repr))
    return groups, frozenset(name for group in groups for name in group.names)


def fold(contributions: Contributions, roles: Sequence[Role]) -> Tensor:
    """Add up one parameter's contributions: over roles in order, within a role over micro-batches in order."""
    total: Tensor | None = None
    for role in roles:
        of_role: Tensor | None = None
        for _, gradient in sorted(((m, g) for (r, m), g in contributions.items() if r == role), key=lambda x: x[0]):
            of_role = gradient.clone() if of_role is None else of_role.add_(gradient)
        if of_role is not None:
            total = of_role if total is None else total.add_(of_role)
    assert total is not None, "a trainable parameter always has a use"
    return total


def reduce_group(
    group: Group,
    local: Mapping[str, Contributions],
    roles: Mapping[str, Sequence[Role]],
    shapes: Mapping[str, torch.Size],
    *,
    me: Peer,
    unit: Unit,
    transport: Transport,
) -> dict[str, Tensor]:
    """The whole gradient of every parameter of a group, on every holder.

    Args:
        group: the parameters and who holds them.
        local: this worker's contributions by parameter name; a name may lack any (no micro-batch of it came here).
        roles: all roles of each parameter, in their fixed order.
        shapes: shape of each parameter.
        me: this worker.
        unit: the step.
        transport: carries the parts.
    """
    # What comes over a wire lies on the CPU, and sums must not depend on who holds the parameter.
    local = {name: {key: gradient.cpu() for key, gradient in local[name].items()} for name in group.names}
    root = group.holders[0]
    if me != root:
        transport.send(root, MessageKey(MessageKind.PARTIAL_GRADIENT, unit, group.key), _pack(group, local, roles))
        total = transport.receive(root, MessageKey(MessageKind.TOTAL_GRADIENT, unit, group.key))["total"]
    else:
        merged = {name: dict(local[name]) for name in group.names}
        for holder in group.holders[1:]:
            part = transport.receive(holder, MessageKey(MessageKind.PARTIAL_GRADIENT, unit, group.key))
            for name, contributions in _unpack(group, part, roles, shapes).items():
                merged[name].update(contributions)
        total = torch.cat([fold(merged[name], roles[name]).reshape(-1) for name in group.names])
        for holder in group.holders[1:]:
            transport.send(holder, MessageKey(MessageKind.TOTAL_GRADIENT, unit, group.key), {"total": total})
    sizes = [shapes[name].numel() for name in group.names]
    return {
        name: flat.reshape(shapes[name]).clone() for name, flat in zip(group.names, total.split(sizes), strict=True)
    }


def _pack(group: Group, local: Mapping[str, Contributions], roles: Mapping[str, Sequence[Role]]) -> dict[str, Tensor]:
    rows = [
        (index, list(roles[name]).index(role), m, gradient.reshape(-1))
        for index, name in enumerate(group.names)
        for (role, m), gradient in sorted(local[name].items(), key=lambda item: (item[0][0], item[0][1]))
    ]
    table = torch.tensor([row[:3] for row in rows], dtype=torch.int64).reshape(-1, 3)
    return {"table": table, "gradients": torch.cat([row[3] for row in rows]) if rows else torch.zeros(0)}


def _unpack(
    group: Group,
    part: Mapping[str, Tensor],
    roles: Mapping[str, Sequence[Role]],
    shapes: Mapping[str, torch.Size],
) -> dict[str, Contributions]:
    found: dict[str, Contributions] = {name: {} for name in group.names}
    start = 0
    for index, role_index, m in part["table"].tolist():
        name = group.names[index]
        end = start + shapes[name].numel()
        found[name][(roles[name][role_index], m)] = part["gradients"][start:end].reshape(shapes[name])
        start = end
    return found
