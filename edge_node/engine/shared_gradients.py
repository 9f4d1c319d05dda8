"""Summing the gradients of parameters that several workers hold, in an order that no partition changes.

Three things make a parameter shared: a tied embedding is used by the first and by the last stage, what several blocks
use by all their stages, and a stage with replicas splits its micro-batches among them. Floating-point sums depend on
their order, so the order is fixed by what is summed and never by who holds it: over roles (embedding, then head; block
after block), and within a role over micro-batches 0, 1, 2, ... A replica therefore hands over its micro-batches'
gradients one by one, each as a message of its own, and the first holder takes them in the order in which it adds them
up, so that it never holds all of them. A role that one worker runs alone hands over its sum, which is the same fold.
A job whose bits may depend on the plan (``numerics: free``) has its replicas hand over their own sums, replica by
replica: as reproducible, and the network carries each gradient once.

The first holder adds up and sends the total to the others: :func:`plan_groups` says who, :class:`Reduction` does it.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from edge_node.methods.base import Role, TrainableParameter
from edge_node.transport.base import MessageKey, MessageKind, Peer, Transport
from partitioner.cost import SUM_MESSAGE_BYTES
from plutino.job.assignment import StageShape
from plutino.types import Unit

Contributions = dict[tuple[Role, int], Tensor]
"""Gradients of one parameter by role and micro-batch; micro-batch -1 stands for the fold over all of them."""

FOLDED = -1

MAX_GROUP_BYTES = SUM_MESSAGE_BYTES
"""Parameters of the same holders go in several groups from this size on, which bounds the messages on their way. While
one group's total comes back, the next one's gradients are sent."""
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


def _parts(
    group: Group, stages: Sequence[StageShape], num_micro_batches: int, *, are_folded: bool
) -> Iterator[tuple[int, Role, int, Peer]]:
    """(number, role, micro-batch, who has it) of all that is added up, in the order in which it is."""
    number = 0
    for role in group.roles:
        stage_index = stage_of_role(role, group.holders[0].stage_index, stages)
        shape = stages[stage_index]
        if are_folded or shape.num_replicas == 1:
            owned = [(FOLDED, replica) for replica in range(shape.num_replicas)]
        else:
            owned = [(m, shape.replica_of(m)) for m in range(num_micro_batches)]
        for m, replica in owned:
            yield number, role, m, Peer(stage_index, replica)
            number += 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Reduction:
    """How the holders of shared parameters add up a step's gradients.

    Args:
        local: this worker's contributions by parameter name; a name may lack any (no micro-batch of it came here).
        shapes: shape of each parameter.
        stages: all stages of the plan.
        num_micro_batches: of the step.
        are_folded: replicas hand over the sums of their own micro-batches.
        me: this worker.
        unit: the step.
        transport: carries the parts.
    """

    local: Mapping[str, Contributions]
    shapes: Mapping[str, torch.Size]
    stages: Sequence[StageShape]
    num_micro_batches: int
    are_folded: bool
    me: Peer
    unit: Unit
    transport: Transport

    def run(self, groups: Sequence[Group]) -> dict[str, Tensor]:
        """The whole gradient of every parameter of the groups, on every holder; on the CPU.

        All holders take the groups in one order. A group's parts are sent before the total of the one before is waited
        for, but only to the same first holder: two that send ahead to each other could wait for each other for ever.
        """
        found: dict[str, Tensor] = {}
        sent: Group | None = None
        for group in groups:
            if sent is not None and sent.holders != group.holders:
                found |= self._finish(sent)
                sent = None
            self._send_parts(group)
            if sent is not None:
                found |= self._finish(sent)
            sent = group
        return found if sent is None else found | self._finish(sent)

    def _parts_of(self, group: Group) -> Iterator[tuple[int, Role, int, Peer]]:
        return _parts(group, self.stages, self.num_micro_batches, are_folded=self.are_folded)

    def _send_parts(self, group: Group) -> None:
        root = group.holders[0]
        if self.me == root:
            return
        for number, role, m, owner in self._parts_of(group):
            if owner == self.me:
                key = MessageKey(MessageKind.PARTIAL_GRADIENT, self.unit, group.key, number)
                self.transport.send(root, key, _pack(group, self.local, role, m))

    def _finish(self, group: Group) -> dict[str, Tensor]:
        root, key = group.holders[0], MessageKey(MessageKind.TOTAL_GRADIENT, self.unit, group.key)
        if self.me != root:
            total = self.transport.receive(root, key)["total"]
        else:
            total = self._add_up(group)
            for holder in group.holders[1:]:
                self.transport.send(holder, key, {"total": total})
        sizes = [self.shapes[name].numel() for name in group.names]
        return {
            name: flat.reshape(self.shapes[name]).clone()
            for name, flat in zip(group.names, total.split(sizes), strict=True)
        }

    def _add_up(self, group: Group) -> Tensor:
        """Every part's gradients, added up in the order of parts within a role and then over roles in order; flat."""
        totals: dict[str, Tensor] = {}
        of_role: dict[str, Tensor] = {}
        summed: Role | None = None
        for number, role, m, owner in self._parts_of(group):
            if role != summed:
                _add(totals, of_role)
                of_role, summed = {}, role
            if owner == self.me:
                # What comes over a wire lies on the CPU, and sums must not depend on who holds the parameter.
                found = {name: self.local[name][role, m].cpu() for name in group.names if (role, m) in self.local[name]}
            else:
                key = MessageKey(MessageKind.PARTIAL_GRADIENT, self.unit, group.key, number)
                found = _unpack(group, self.transport.receive(owner, key), self.shapes)
            _add(of_role, found)
        _add(totals, of_role)
        # Where no micro-batch had a label token, nobody has a gradient.
        return torch.cat([totals.get(name, torch.zeros(self.shapes[name])).reshape(-1) for name in group.names])


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
