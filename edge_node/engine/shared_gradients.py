"""Summing the gradients of parameters that several workers hold, in an order that no partition changes.

Three things make a parameter shared: a tied embedding is used by the first and by the last stage, what several blocks
use by all their stages, and a stage with replicas splits its micro-batches among them. Floating-point sums depend on
their order, so the order is fixed by what is summed and never by who holds it: over roles (embedding, then head; block
after block), and within a role over micro-batches 0, 1, 2, ... The sum of a role goes from owner to owner of its
micro-batches, each of whom adds its own; the total of all roles goes from last owner to last owner, and from there to
all holders (:mod:`partitioner.sum_path`). A role that one worker runs alone is one sum, which is the same fold.
A job whose bits may depend on the plan (``numerics: free``) has each replica add up its own micro-batches first.

Where sums travel in 16 bits they are rounded (:mod:`edge_node.engine.sum_rounding`) after each addition: of a
micro-batch's gradient to the sum of its role, its first one included, and of a role's sum to the total. That too
depends on what is added alone.

:func:`plan_groups` says what travels together, :func:`hops_of` on which way, :mod:`edge_node.engine.sum_turns` who does
what when; :class:`Reduction` does it. The upper blocks' gradients come first, so theirs are the first groups: where the
holders are replicas of one stage, the sums of those travel while the blocks below still run backward
(:class:`edge_node.engine.step_gradients.StepGradients`).
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from edge_node.engine.running_sum import RunningSum, travelling_bytes
from edge_node.engine.sum_rounding import round_sums
from edge_node.engine.sum_turns import Hop, TurnKind, messages_per_link, turns_of
from edge_node.engine.taken_gradients import FOLDED, Contributions, TakenGradients
from edge_node.methods.base import Role, TrainableParameter
from edge_node.transport.base import MessageKey, MessageKind, Peer, Transport
from partitioner.cost import SUM_MESSAGE_BYTES
from partitioner.sum_path import runs, way_back
from plutino.job.assignment import StageShape
from plutino.types import SumDtype, Unit

MAX_GROUP_BYTES = SUM_MESSAGE_BYTES
"""Parameters of the same holders go in several groups from this size on, which bounds the messages on their way. While
one group's sum is at its next owner, the one after it follows."""


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

    @property
    def is_of_one_stage(self) -> bool:
        """Whether all holders are replicas of each other."""
        return len({holder.stage_index for holder in self.holders}) == 1


def stage_of_role(role: Role, own_stage_index: int, stages: Sequence[StageShape]) -> int:
    """The stage that has a parameter's use."""
    kind, _, block = role.partition(" ")
    if block:
        return next(i for i, stage in enumerate(stages) if stage.start_block <= int(block) < stage.end_block)
    return {"embedding": 0, "head": len(stages) - 1}.get(kind, own_stage_index)


def plan_groups(
    parameters: Sequence[TrainableParameter], stages: Sequence[StageShape], me: Peer, sums: SumDtype = "fp32"
) -> tuple[tuple[Group, ...], frozenset[str]]:
    """Groups of this worker's shared parameters, and the names of all of them."""
    alike: dict[tuple[tuple[Peer, ...], tuple[Role, ...]], list[str]] = {}
    for parameter in parameters:
        held_by = sorted({stage_of_role(role, me.stage_index, stages) for role in parameter.all_roles})
        holders = tuple(Peer(s, r) for s in held_by for r in range(stages[s].num_replicas))
        if len(holders) > 1:
            alike.setdefault((holders, parameter.all_roles), []).append(parameter.name)
    sizes = {p.name: travelling_bytes(p.uses[0][1].numel(), sums) for p in parameters}
    groups = tuple(
        Group(holders, names, roles)
        for (holders, roles), all_names in sorted(alike.items(), key=repr)
        for names in _batched(sorted(all_names, key=_when_ready), sizes)
    )
    # What replicas share is summed while passes run, what stages share afterwards; the order of either is the same on
    # all its holders.
    in_turn = sorted(groups, key=lambda group: not group.is_of_one_stage)
    return tuple(in_turn), frozenset(name for group in groups for name in group.names)


def _when_ready(name: str) -> tuple[bool, bool, int, str]:
    """Sorts names as a backward pass comes to them: from the last block down, an encoder-decoder's decoder first.

    What no block has goes last. It may be ready before, but then nothing waits for it.
    """
    parts = name.split(".")
    block = next((int(part) for part in parts if part.isdigit()), None)
    return block is None, "decoder" not in parts, -(block or 0), name


def _batched(names: Sequence[str], sizes: Mapping[str, int]) -> Iterator[tuple[str, ...]]:
    """Names in order, as many together as one message may carry, at least one."""
    batch: list[str] = []
    for name in names:
        if batch and sum(sizes[held] for held in batch) + sizes[name] > MAX_GROUP_BYTES:
            yield tuple(batch)
            batch = []
        batch.append(name)
    yield tuple(batch)


def fold(contributions: Contributions, roles: Sequence[Role], *, is_rounded: bool = False) -> Tensor:
    """Add up one parameter's contributions: over roles in order, within a role over micro-batches in order.

    Args:
        contributions: what is added.
        roles: in their order.
        is_rounded: round after each addition.
    """
    total: Tensor | None = None
    for role in roles:
        of_role: Tensor | None = None
        for _, gradient in sorted(((m, g) for (r, m), g in contributions.items() if r == role), key=lambda x: x[0]):
            of_role = gradient.clone() if of_role is None else of_role.add_(gradient)
            if is_rounded:
                round_sums([of_role])
        if of_role is not None:
            total = of_role if total is None else total.add_(of_role)
            if is_rounded:
                round_sums([total])
    assert total is not None, "a trainable parameter always has a use"
    return total


def hops_of(group: Group, stages: Sequence[StageShape], num_micro_batches: int, *, are_folded: bool) -> tuple[Hop, ...]:
    """Where the sum of a group's gradients goes, in this order."""
    hops: list[Hop] = []
    for role in group.roles:
        stage_index = stage_of_role(role, group.holders[0].stage_index, stages)
        shape = stages[stage_index]
        stops = runs([shape.replica_of(m) for m in range(num_micro_batches)])
        if are_folded or shape.num_replicas == 1:
            stops = tuple((replica, (FOLDED,)) for replica in range(shape.num_replicas))
        for place, (replica, micro_batches) in enumerate(stops):
            hops.append(Hop(Peer(stage_index, replica), role, micro_batches, place == len(stops) - 1))
    return tuple(hops)


def sum_partners(
    groups: Sequence[Group], stages: Sequence[StageShape], me: Peer, *, are_folded: bool
) -> frozenset[Peer]:
    """The workers with which this one exchanges sums or totals in a unit of any length."""
    found: set[Peer] = set()
    for holders, roles in dict.fromkeys((group.holders, group.roles) for group in groups):
        group = Group(holders, (), roles)
        tables = [stages[stage_of_role(role, holders[0].stage_index, stages)].micro_batch_owner for role in roles]
        # A longer unit wraps around the tables: past two rounds of all of them nothing new comes.
        longest = 2 * math.lcm(*(max(1, len(table)) for table in tables))
        for num_micro_batches in range(1, longest + 1):
            hops = hops_of(group, stages, num_micro_batches, are_folded=are_folded)
            uses = messages_per_link(hops, way_back([hop.owner for hop in hops], holders))
            found.update(*(pair for pair in uses if me in pair))
    return frozenset(found - {me})


@dataclass(frozen=True, slots=True, kw_only=True)
class Reduction:
    """How the holders of shared parameters add up a step's gradients.

    Args:
        taken: this worker's own gradients, which may still be coming; a name may lack any (no micro-batch of it came
            here).
        shapes: shape of each parameter.
        stages: all stages of the plan.
        num_micro_batches: of the step.
        are_folded: replicas hand over the sums of their own micro-batches.
        sums: how sums are held and travel.
        me: this worker.
        unit: the step.
        transport: carries the parts.
    """

    taken: TakenGradients
    shapes: Mapping[str, torch.Size]
    stages: Sequence[StageShape]
    num_micro_batches: int
    are_folded: bool
    sums: SumDtype
    me: Peer
    unit: Unit
    transport: Transport

    def run(self, groups: Sequence[Group]) -> dict[str, Tensor]:
        """The whole gradient of every parameter of the groups, on every holder; on the CPU.

        Groups of the same holders and roles follow one another; all holders take those of one kind before the next.

        Raises:
            PassesAbandonedError: own gradients will not come.
        """
        found: dict[str, Tensor] = {}
        for (holders, roles), alike in groupby(groups, key=lambda group: (group.holders, group.roles)):
            way = Group(holders, (), roles)
            hops = hops_of(way, self.stages, self.num_micro_batches, are_folded=self.are_folded)
            found |= _Sums(self, hops, way_back([hop.owner for hop in hops], holders), tuple(alike)).run()
        return found


class _Sums:
    """The sums of groups that take the same way."""

    def __init__(self, asked: Reduction, hops: Sequence[Hop], back: Sequence[Peer], groups: Sequence[Group]) -> None:
        self._asked = asked
        self._hops, self._back, self._groups = hops, back, groups
        self._ends = [place for place, hop in enumerate(hops) if hop.ends_role]
        self._held: dict[tuple[int, int], RunningSum] = {}
        """(group, hop) -> a sum that this worker keeps until it is handed on."""
        self._totals: dict[int, RunningSum] = {}

    def run(self) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for turn in turns_of(self._hops, self._back, len(self._groups), self._asked.me):
            match turn.kind:
                case TurnKind.ADD:
                    self._add_own(turn.group, turn.place)
                case TurnKind.HAND_ON:
                    self._hand_on(turn.group, turn.place)
                case TurnKind.SPREAD:
                    found |= self._spread(turn.group, turn.place)
        return found

    def _add_own(self, index: int, place: int) -> None:
        asked, group, hop = self._asked, self._groups[index], self._hops[place]
        begins_role = place == 0 or self._hops[place - 1].ends_role
        sums = self._empty(index) if begins_role else self._from(index, place - 1)
        asked.taken.wait_for(group.names, hop.role, hop.micro_batches)
        for m in hop.micro_batches:
            # What comes over a wire lies on the CPU, and sums must not depend on who holds the parameter.
            own = {name: asked.taken.of(name).get((hop.role, m)) for name in group.names}
            sums.add({name: gradient.cpu() for name, gradient in own.items() if gradient is not None})
        if hop.ends_role and (before := [end for end in self._ends if end < place]):
            totals = self._from(index, before[-1])
            totals.add(sums.values())
            sums = totals
        if not hop.ends_role and self._hops[place + 1].owner != asked.me:
            self._send(index, place, self._hops[place + 1].owner, sums)
        elif place < len(self._hops) - 1:
            self._held[index, place] = sums
        else:
            self._totals[index] = sums

    def _hand_on(self, index: int, place: int) -> None:
        owner = self._hops[next(end for end in self._ends if end > place)].owner
        if owner != self._asked.me:
            self._send(index, place, owner, self._held.pop((index, place)))

    def _spread(self, index: int, step: int) -> dict[str, Tensor]:
        key = self._key(MessageKind.TOTAL_GRADIENT, index, 0)
        total = self._received(index, self._back[step - 1], key) if step else self._totals.pop(index)
        if step + 1 < len(self._back):
            self._asked.transport.send(self._back[step + 1], key, total.message())
        return total.gradients()

    def _from(self, index: int, place: int) -> RunningSum:
        """The sum that a hop left."""
        owner = self._hops[place].owner
        if owner == self._asked.me:
            return self._held.pop((index, place))
        return self._received(index, owner, self._key(MessageKind.PARTIAL_GRADIENT, index, place))

    def _received(self, index: int, owner: Peer, key: MessageKey) -> RunningSum:
        sums = self._empty(index)
        sums.receive(self._asked.transport.receive(owner, key))
        return sums

    def _empty(self, index: int) -> RunningSum:
        asked = self._asked
        return RunningSum({name: asked.shapes[name] for name in self._groups[index].names}, asked.sums)

    def _send(self, index: int, place: int, peer: Peer, sums: RunningSum) -> None:
        self._asked.transport.send(peer, self._key(MessageKind.PARTIAL_GRADIENT, index, place), sums.message())

    def _key(self, kind: MessageKind, index: int, place: int) -> MessageKey:
        return MessageKey(kind, self._asked.unit, self._groups[index].key, place)
