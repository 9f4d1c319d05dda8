"""Summing the gradients of parameters that several workers hold, in an order that no partition changes.

Three things make a parameter shared: a tied embedding is used by the first and by the last stage, what several blocks
use by all their stages, and a stage with replicas splits its micro-batches among them. Floating-point sums depend on
their order, so the order is fixed by what is summed and never by who holds it: over roles (embedding, then head; block
after block), and within a role over micro-batches 0, 1, 2, ... A replica therefore hands over its micro-batches'
gradients one by one, each as a message of its own, and the first holder takes them in the order in which it adds them
up, so that it never holds all of them. A role that one worker runs alone hands over its sum, which is the same fold.

The first holder adds up and sends the total to the others: :func:`plan_groups` says who, :func:`reduce_group` does it.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence
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

MAX_GROUP_BYTES = 32 << 20
"""Parameters of the same holders go in several groups from this size on, which bounds the messages on their way."""
_FP32_BYTES = 4


@dataclass(frozen=True, slots=True)
class Group:
    """Parameters with the same holders and uses, whose gradients travel together."""

    holders: tuple[Peer, ...]
    names: tuple[str, ...]
    roles: tuple[Role, ...]
    """In the order in which gradients are added up."""

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
    alike: dict[tuple[tuple[Peer, ...], tuple[Role, ...]], list[str]] = {}
    for parameter in parameters:
        held_by = sorted({stage_of_role(role, me.stage_index, stages) for role in parameter.all_roles})
        holders = tuple(Peer(s, r) for s in held_by for r in range(stages[s].num_replicas))
        if len(holders) > 1:
            alike.setdefault((holders, parameter.all_roles), []).append(parameter.name)
    sizes = {parameter.name: _FP32_BYTES * parameter.uses[0][1].numel() for parameter in parameters}
    groups = tuple(
        Group(holders, names, roles)
        for (holders, roles), all_names in sorted(alike.items(), key=repr)
        for names in _batched(sorted(all_names), sizes)
    )
    return groups, frozenset(name for group in groups for name in group.names)


def _batched(names: Sequence[str], sizes: Mapping[str, int]) -> Iterator[tuple[str, ...]]:
    """Names in order, as many together as one message may carry, at least one."""
    batch: list[str] = []
    for name in names:
        if batch and sum(sizes[held] for held in batch) + sizes[name] > MAX_GROUP_BYTES:
            yield tuple(batch)
            batch = []
        batch.append(name)
    yield tuple(batch)


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


def _parts(group: Group, stages: Sequence[StageShape], num_micro_batches: int) -> Iterator[tuple[int, Role, int, Peer]]:
    """(number, role, micro-batch, who has it) of all that is added up, in the order in which it is."""
    number = 0
    for role in group.roles:
        stage_index = stage_of_role(role, group.holders[0].stage_index, stages)
        shape = stages[stage_index]
        for m in range(num_micro_batches) if shape.num_replicas > 1 else (FOLDED,):
            yield number, role, m, Peer(stage_index, 0 if m == FOLDED else shape.replica_of(m))
            number += 1


def reduce_group(
    group: Group,
    local: Mapping[str, Contributions],
    shapes: Mapping[str, torch.Size],
    *,
    stages: Sequence[StageShape],
    num_micro_batches: int,
    me: Peer,
    unit: Unit,
    transport: Transport,
) -> dict[str, Tensor]:
    """The whole gradient of every parameter of a group, on every holder; on the CPU.

    Args:
        group: the parameters and who holds them.
        local: this worker's contributions by parameter name; a name may lack any (no micro-batch of it came here).
        shapes: shape of each parameter.
        stages: all stages of the plan.
        num_micro_batches: of the step.
        me: this worker.
        unit: the step.
        transport: carries the parts.
    """
    root = group.holders[0]
    parts = _parts(group, stages, num_micro_batches)
    if me != root:
        for number, role, m, owner in parts:
            if owner == me:
                key = MessageKey(MessageKind.PARTIAL_GRADIENT, unit, group.key, number)
                transport.send(root, key, _pack(group, local, role, m))
        total = transport.receive(root, MessageKey(MessageKind.TOTAL_GRADIENT, unit, group.key))["total"]
    else:
        total = _add_up(group, local, shapes, parts, me=me, unit=unit, transport=transport)
        for holder in group.holders[1:]:
            transport.send(holder, MessageKey(MessageKind.TOTAL_GRADIENT, unit, group.key), {"total": total})
    sizes = [shapes[name].numel() for name in group.names]
    return {
        name: flat.reshape(shapes[name]).clone() for name, flat in zip(group.names, total.split(sizes), strict=True)
    }


def _add_up(
    group: Group,
    local: Mapping[str, Contributions],
    shapes: Mapping[str, torch.Size],
    parts: Iterator[tuple[int, Role, int, Peer]],
    *,
    me: Peer,
    unit: Unit,
    transport: Transport,
) -> Tensor:
    """Every part's gradients, added up over micro-batches in order and then over roles in order; flat."""
    totals: dict[str, Tensor] = {}
    of_role: dict[str, Tensor] = {}
    summed: Role | None = None
    for number, role, m, owner in parts:
        if role != summed:
            _add(totals, of_role)
            of_role, summed = {}, role
        if owner == me:
            # What comes over a wire lies on the CPU, and sums must not depend on who holds the parameter.
            found = {name: local[name][role, m].cpu() for name in group.names if (role, m) in local[name]}
        else:
            key = MessageKey(MessageKind.PARTIAL_GRADIENT, unit, group.key, number)
            found = _unpack(group, transport.receive(owner, key), shapes)
        _add(of_role, found)
    _add(totals, of_role)
    # Where no micro-batch had a label token, nobody has a gradient.
    return torch.cat([totals.get(name, torch.zeros(shapes[name])).reshape(-1) for name in group.names])


def _add(sums: dict[str, Tensor], found: Mapping[str, Tensor]) -> None:
    for name, gradient in found.items():
        sums[name] = sums[name].add_(gradient) if name in sums else gradient.clone()


def _pack(group: Group, local: Mapping[str, Contributions], role: Role, m: int) -> dict[str, Tensor]:
    found = [local[name].get((role, m)) for name in group.names]
    flat = [gradient.cpu().reshape(-1) for gradient in found if gradient is not None]
    return {
        "present": torch.tensor([gradient is not None for gradient in found], dtype=torch.uint8),
        "gradients": torch.cat(flat) if flat else torch.zeros(0),
    }


def _unpack(group: Group, part: Mapping[str, Tensor], shapes: Mapping[str, torch.Size]) -> dict[str, Tensor]:
    names = [name for name, is_there in zip(group.names, part["present"].tolist(), strict=True) if is_there]
    sizes = [shapes[name].numel() for name in names]
    return {name: flat.reshape(shapes[name]) for name, flat in zip(names, part["gradients"].split(sizes), strict=True)}
