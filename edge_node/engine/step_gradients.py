"""The gradients of one step on one worker: taken a micro-batch at a time, summed over all who hold a parameter."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from edge_node.engine.running_sum import travelling_bytes
from edge_node.engine.shared_gradients import FOLDED, Contributions, Reduction, fold, plan_groups, sum_partners
from edge_node.engine.sum_rounding import round_sums
from edge_node.methods.base import TrainableParameter
from edge_node.transport.base import Peer, Transport
from plutino.job.assignment import StageShape
from plutino.types import SumDtype, Unit


def squared_norms(gradients: Mapping[str, Tensor], names: Sequence[str]) -> tuple[float, ...]:
    """Squared L2 norm of each gradient in the order of names, in fp64; 0 where there is none. One wait for a card."""
    found = [name for name in names if name in gradients]
    if not found:
        return (0.0,) * len(names)
    norms = torch.stack([torch.linalg.vector_norm(gradients[name], dtype=torch.float64) for name in found]).tolist()
    of_name = dict(zip(found, norms, strict=True))
    return tuple(of_name.get(name, 0.0) ** 2 for name in names)


class StepGradients:
    """What the backward passes of a step have given so far.

    Args:
        parameters: all that the stage trains.
        stages: all stages of the plan.
        me: this worker.
        replicas_fold: replicas hand over the sums of their own micro-batches.
        sums: how sums travel. Where replicas do not fold, those that stay here are rounded likewise.
    """

    def __init__(
        self,
        parameters: Sequence[TrainableParameter],
        stages: Sequence[StageShape],
        me: Peer,
        *,
        replicas_fold: bool = False,
        sums: SumDtype = "fp32",
    ) -> None:
        self._parameters = tuple(parameters)
        self._stages = stages
        self._me = me
        self._replicas_fold = replicas_fold
        self._is_folded = replicas_fold or stages[me.stage_index].num_replicas == 1
        self._sums: SumDtype = sums
        # What may depend on the plan is rounded where it is handed over, and nowhere else.
        self._rounds_own = sums == "fp16" and not replicas_fold
        self.groups, self._shared_names = plan_groups(parameters, stages, me, sums)
        """Parameters that other workers hold too."""
        self._contributions: dict[str, Contributions] = {}

    @property
    def largest_message_bytes(self) -> int:
        """Bytes of the largest message of shared parameters' gradients, without its header."""
        sizes = {p.name: travelling_bytes(p.uses[0][1].numel(), self._sums) for p in self._parameters}
        return max((sum(sizes[name] for name in group.names) for group in self.groups), default=0)

    @property
    def partners(self) -> frozenset[Peer]:
        """Workers with which sums are exchanged."""
        return sum_partners(self.groups, self._stages, self._me, are_folded=self._replicas_fold)

    def start(self) -> None:
        """Begin a step: nothing is held of the one before."""
        self.drop()
        self._contributions = {p.name: {} for p in self._parameters}

    def drop(self) -> None:
        """Forget everything."""
        self._contributions = {}
        for parameter in self._parameters:
            for _, use in parameter.uses:
                use.grad = None

    def take(self, m: int) -> None:
        """Move .grad of every use into the step's contributions, separately only where replicas will need it."""
        added: list[Tensor] = []
        for parameter in self._parameters:
            for role, use in parameter.uses:
                if use.grad is None:
                    continue
                key = (role, FOLDED if self._is_folded else m)
                held = self._contributions[parameter.name]
                # Autograd would fold later micro-batches into .grad in place and in order, which is the same sum;
                # taking it out keeps the two cases alike.
                if key in held:
                    held[key].add_(use.grad)
                else:
                    held[key] = use.grad
                added.append(held[key])
                use.grad = None
        if self._is_folded and self._rounds_own:
            round_sums(added)

    def whole(
        self,
        trained: Collection[str],
        *,
        num_micro_batches: int,
        unit: Unit,
        transport: Transport | None,
        device: torch.device,
    ) -> dict[str, Tensor]:
        """The whole gradient of every trained parameter, summed over all its holders; the contributions are used up."""
        shapes = {p.name: p.uses[0][1].shape for p in self._parameters}
        gradients: dict[str, Tensor] = {}
        for parameter in self._parameters:
            if parameter.name in self._shared_names or parameter.name not in trained:
                continue
            held = self._contributions[parameter.name]
            if len(held) == 1:
                (gradients[parameter.name],) = held.values()
            elif held:
                gradients[parameter.name] = fold(held, parameter.all_roles, is_rounded=self._rounds_own)
            else:
                gradients[parameter.name] = torch.zeros_like(parameter.uses[0][1])
        if self.groups:
            assert transport is not None, "what several workers hold travels between them"
            reduction = Reduction(
                local=self._contributions,
                shapes=shapes,
                stages=self._stages,
                num_micro_batches=num_micro_batches,
                are_folded=self._replicas_fold,
                sums=self._sums,
                me=self._me,
                unit=unit,
                transport=transport,
            )
            totals = reduction.run(self.groups)
            gradients |= {name: total.to(device) for name, total in totals.items() if name in trained}
        self._contributions = {}
        return gradients
