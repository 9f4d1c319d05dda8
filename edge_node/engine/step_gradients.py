"""The gradients of one step on one worker: taken a micro-batch at a time, summed over all who hold a parameter.

Replicas of a stage sum theirs on a thread of its own while the passes still run: it waits for a group's gradients, adds
them to what has come, and hands the sum on. What is added to what, and in which order, is the same either way.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from edge_node.engine.running_sum import travelling_bytes
from edge_node.engine.shared_gradients import Group, Reduction, fold, plan_groups, sum_partners
from edge_node.engine.taken_gradients import TakenGradients
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
    """What the backward passes of a step have given so far, and the sums over all holders.

    Args:
        parameters: all that the stage trains.
        stages: all stages of the plan.
        me: this worker.
        replicas_fold: replicas hand over the sums of their own micro-batches.
        sums: how sums travel. Where replicas do not fold, those that stay here are rounded likewise.
        device: where gradients lie. A card's follow its passes, because the host waits for all that is queued there.
    """

    def __init__(
        self,
        parameters: Sequence[TrainableParameter],
        stages: Sequence[StageShape],
        me: Peer,
        *,
        replicas_fold: bool = False,
        sums: SumDtype = "fp32",
        device: torch.device,
    ) -> None:
        self._parameters = tuple(parameters)
        self._stages = stages
        self._me = me
        self._device = device
        self._replicas_fold = replicas_fold
        self._is_folded = replicas_fold or stages[me.stage_index].num_replicas == 1
        self._sums: SumDtype = sums
        # What may depend on the plan is rounded where it is handed over, and nowhere else.
        self._rounds_own = sums == "fp16" and not replicas_fold
        self.groups, self._shared_names = plan_groups(parameters, stages, me, sums)
        """Parameters that other workers hold too."""
        of_replicas = [group for group in self.groups if group.is_of_one_stage]
        self._sums_beside = bool(of_replicas) and device.type == "cpu"
        self._announced = [name for group in of_replicas for name in group.names] if self._sums_beside else []
        self._thread = _SumThread() if self._sums_beside else None
        self._taken = self._nothing_taken()
        self._totals: Future[dict[str, Tensor]] | None = None
        self._asked: Reduction | None = None

    @property
    def largest_message_bytes(self) -> int:
        """Bytes of the largest message of shared parameters' gradients, without its header."""
        sizes = {p.name: travelling_bytes(p.uses[0][1].numel(), self._sums) for p in self._parameters}
        return max((sum(sizes[name] for name in group.names) for group in self.groups), default=0)

    @property
    def partners(self) -> frozenset[Peer]:
        """Workers with which sums are exchanged."""
        return sum_partners(self.groups, self._stages, self._me, are_folded=self._replicas_fold)

    @property
    def is_summing(self) -> bool:
        """Whether sums are on their way: the worker has nothing to do for them."""
        return self._totals is not None and not self._totals.done()

    def start(self) -> None:
        """Begin a step: nothing is held of the one before."""
        self.drop()

    def drop(self) -> None:
        """Forget everything; sums that are on their way end with their unit."""
        self._taken.abandon()
        self._taken = self._nothing_taken()
        self._totals = self._asked = None
        for parameter in self._parameters:
            for _, use in parameter.uses:
                use.grad = None

    def expect(
        self, micro_batches: Collection[int], *, num_micro_batches: int, unit: Unit, transport: Transport | None
    ) -> None:
        """Be ready for the step's backward passes; sums begin with the first gradients.

        Args:
            micro_batches: those that this worker runs backward.
            num_micro_batches: of the step.
            unit: the step.
            transport: the way to the other holders.
        """
        self._taken.start(micro_batches)
        if not self.groups:
            return
        assert transport is not None, "what several workers hold travels between them"
        self._asked = Reduction(
            taken=self._taken,
            shapes={p.name: p.uses[0][1].shape for p in self._parameters},
            stages=self._stages,
            num_micro_batches=num_micro_batches,
            are_folded=self._replicas_fold,
            sums=self._sums,
            me=self._me,
            unit=unit,
            transport=transport,
        )
        if self._thread is not None:
            self._totals = self._thread.begin(self._asked, self.groups)

    def begin_pass(self, m: int) -> None:
        """A micro-batch's backward pass begins."""
        self._taken.begin_pass(m)

    def end_pass(self, m: int) -> None:
        """It is over."""
        self._taken.end_pass(m)

    def end_passes(self) -> None:
        """The step's passes are over."""
        self._taken.end_passes()

    def whole(self, trained: Collection[str]) -> dict[str, Tensor]:
        """The whole gradient of every trained parameter, summed over all its holders; the contributions are used up.

        Raises:
            PeerLostError: a holder went away.
            UnitCancelledError: the coordinator abandoned the step.
        """
        self.end_passes()
        gradients: dict[str, Tensor] = {}
        for parameter in self._parameters:
            if parameter.name in self._shared_names or parameter.name not in trained:
                continue
            held = self._taken.of(parameter.name)
            if len(held) == 1:
                (gradients[parameter.name],) = held.values()
            elif held:
                gradients[parameter.name] = fold(held, parameter.all_roles, is_rounded=self._rounds_own)
            else:
                gradients[parameter.name] = torch.zeros_like(parameter.uses[0][1])
        if self._asked is not None:
            totals = self._asked.run(self.groups) if self._totals is None else self._totals.result()
            gradients |= {name: total.to(self._device) for name, total in totals.items() if name in trained}
        self._totals = self._asked = None
        self._taken = self._nothing_taken()
        return gradients

    def _nothing_taken(self) -> TakenGradients:
        return TakenGradients(
            self._parameters,
            self._announced,
            is_folded=self._is_folded,
            is_rounded=self._is_folded and self._rounds_own,
        )


class _SumThread:
    """One thread that adds up and talks while another one computes; it ends with its owner."""

    def __init__(self) -> None:
        self._pool: ThreadPoolExecutor | None = None

    def begin(self, asked: Reduction, groups: Sequence[Group]) -> Future[dict[str, Tensor]]:
        """Run a reduction after those begun before."""
        if self._pool is None:
            self._pool = ThreadPoolExecutor(1, thread_name_prefix="plutino-sums")
            # Beside passes on all of a worker's threads, more than one would take their processors. What a thread sets
            # for itself is the default of threads to come as well, so the worker's own number is said once more.
            num_threads = torch.get_num_threads()
            self._pool.submit(torch.set_num_threads, 1).result()
            torch.set_num_threads(num_threads)
        return self._pool.submit(asked.run, groups)
