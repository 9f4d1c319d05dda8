"""What a layout with its cuts costs: which stages fit, with or without checkpointing, and how long a step takes.

Entry point: :class:`Pricer`, one for a job's shape on a fleet. Every part of the planner asks it, so that a plan is
priced by the same numbers wherever it was found.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from partitioner.cost import StageCost, stage_cost
from partitioner.kept_prefix import embedded_share, keeps_source, kept_row_tokens, read_s
from partitioner.layout import Cuts, Layout, ahead_of
from partitioner.place import Ints
from partitioner.plan import UpperStep
from partitioner.replay import Floats, StageGroup, StepTime, replay, replay_many
from partitioner.shape import JobShape
from partitioner.shared_sums import shared_sum_s
from partitioner.side_prices import SidePrices


@dataclass(frozen=True, slots=True)
class Candidate:
    """A complete assignment with its replayed step."""

    layout: Layout
    cuts: Cuts
    checkpointing: tuple[bool, ...]
    """Of every stage."""
    groups: tuple[StageGroup, ...]
    time: StepTime
    cost_s: float
    """What candidates are compared by: see :meth:`Pricer.cost_s`."""

    @property
    def step_s(self) -> float:
        """Predicted seconds of one optimiser step through the blocks."""
        return self.time.step_s


@dataclass(frozen=True, slots=True)
class StageOption:
    """One stage of a layout with some blocks, as it fits."""

    checkpointing: bool
    group: StageGroup
    forward_s: tuple[float, ...]
    """Of every replica."""
    backward_s: tuple[float, ...]


class Pricer(SidePrices):
    """Bytes and seconds of stages of one job on one fleet; made as :class:`partitioner.rooms.Rooms` says."""

    @cached_property
    def _costs(self) -> dict[tuple[int, int, int, bool, bool], StageCost]:
        return {}

    @cached_property
    def _options(self) -> dict[Layout, list[dict[int, StageOption | None]]]:
        return {}

    @cached_property
    def _shared_s(self) -> dict[Layout, float]:
        return {}

    def of_shape(self, shape: JobShape) -> Pricer:
        """The same for another shape of the job, on the same fleet."""
        return Pricer(self.table, shape, self.devices, self.links)

    def option(self, layout: Layout, k: int, start: int, end: int) -> StageOption | None:
        """Stage k of a layout with these blocks; None if it is empty or fits in no way."""
        found = self._options.get(layout)
        if found is None:
            found = self._options[layout] = [{} for _ in layout]
        key = start * (self.table.num_blocks + 1) + end
        if key not in found[k]:
            found[k][key] = self._make_option(layout, k, start, end) if start < end else None
        return found[k][key]

    def _make_option(self, layout: Layout, k: int, start: int, end: int) -> StageOption | None:
        choice = self.mode(self.places(layout)[k], start, end)
        if choice is None:
            return None
        group = self.group(layout, k, start, end, checkpointing=choice)
        forward_s = tuple([cost.forward_s for cost in group.replicas])
        return StageOption(choice, group, forward_s, tuple([cost.backward_s for cost in group.replicas]))

    def _stage_options(self, layout: Layout, cuts: Cuts) -> list[StageOption] | None:
        """Every stage of a layout; None if one does not fit."""
        found = []
        for k in range(len(layout)):
            option = self.option(layout, k, cuts[k], cuts[k + 1])
            if option is None:
                return None
            found.append(option)
        return found

    def cost(self, device: int, start: int, end: int, *, checkpointing: bool, keeps_heap: bool = True) -> StageCost:
        """Seconds of a stage on one device, its links apart; at least those where malloc may keep what is freed."""
        key = (device, start, end, checkpointing, keeps_heap)
        if key not in self._costs:
            is_last = end == self.table.num_blocks
            num_trained = end - max(start, min(self.shape.first_trainable_block, end))
            found = stage_cost(
                self.table,
                self.shape,
                self.devices[device],
                start_block=start,
                end_block=end,
                checkpointing=checkpointing,
                link=None,
                keeps_heap=keeps_heap,
            )
            self._costs[key] = StageCost(
                found.forward_s,
                found.backward_s,
                has_backward=found.has_backward,
                gets_gradient=not is_last and num_trained > 0,
            )
        return self._costs[key]

    def group(self, layout: Layout, k: int, start: int, end: int, *, checkpointing: bool) -> StageGroup:
        """One stage of a layout with its seconds."""
        group = layout[k]
        return StageGroup(
            replicas=tuple(
                self.cost(
                    device,
                    start,
                    end,
                    checkpointing=checkpointing,
                    keeps_heap=self.devices[device].timings.mapped_forward_s is None
                    or self.keeps_heap(layout, k, replica, start, end, checkpointing=checkpointing),
                )
                for replica, device in enumerate(group)
            ),
            owners=self.owners(group, is_alone=len(layout) == 1),
            links=self.links_below(layout, k, is_rounded=end in self.shape.bf16_borders),
            ahead=ahead_of(layout, k, runs_ahead=self.shape.runs_ahead),
            # Stages that share a gradient have it when the first stage's last pass is over.
            sum_s=self.sum_s(layout, k, start, end) + (self._shared_sum_s(layout) if k == 0 else 0.0),
        )

    def _shared_sum_s(self, layout: Layout) -> float:
        if layout not in self._shared_s:
            self._shared_s[layout] = shared_sum_s(self, layout)
        return self._shared_s[layout]

    def candidate(self, layout: Layout, cuts: Cuts) -> Candidate | None:
        """A layout with its cuts, replayed; None if it does not fit."""
        options = self._stage_options(layout, cuts)
        if options is None:
            return None
        groups = tuple(option.group for option in options)
        modes = tuple(option.checkpointing for option in options)
        return self._candidate(layout, cuts, modes, groups)

    def fixed(self, layout: Layout, cuts: Cuts, modes: tuple[bool, ...]) -> Candidate:
        """A layout with its cuts and its checkpointing as they are, replayed, whether it fits or not."""
        groups = tuple(self.group(layout, k, cuts[k], cuts[k + 1], checkpointing=modes[k]) for k in range(len(layout)))
        return self._candidate(layout, cuts, modes, groups)

    def first_epoch(self, found: Candidate) -> Candidate:
        """A candidate with the seconds of an epoch in which all blocks run, where it is compared by the mean."""
        if self.shape.frozen_share == 1.0:
            return found
        return self._at_share(1.0).fixed(found.layout, found.cuts, found.checkpointing)

    def upper_step(self, found: Candidate) -> UpperStep | None:
        """A step of the later epochs of a candidate; None: all blocks run in them."""
        shape = self.shape
        if shape.frozen_share == 1.0:
            return None
        place = shape.first_trainable_block
        at = next(k for k in range(len(found.layout)) if place < found.cuts[k + 1])
        later = self._at_share(0.0).fixed(found.layout, found.cuts, found.checkpointing)
        share, groups = embedded_share(self.table, shape), []
        for k, group in enumerate(later.groups):
            if k == at:
                group = _with_forward(group, [read_s(self.table, shape)] * len(group.replicas))
            if k == 0 and share:
                embedding_s = [self.devices[device].timings.embedding_s for device in found.layout[0]]
                group = _with_forward(group, [share * seconds for seconds in embedding_s])
            # Of hidden states nothing but a target's embeddings crosses a border at or below the place.
            is_idle = found.cuts[k + 1] <= place
            groups.append(replace(group, links=_with_messages(group.links, share)) if is_idle else group)
        return UpperStep(
            place=place,
            step_s=replay(groups, self.num_micro_batches).step_s,
            row_bytes=kept_row_tokens(self.table, shape) * shape.entry_token_bytes,
            keeps_source=keeps_source(self.table, shape),
        )

    def _at_share(self, frozen_share: float) -> Pricer:
        return self.of_shape(self.shape.model_copy(update={"frozen_share": frozen_share}))

    def _candidate(
        self, layout: Layout, cuts: Cuts, modes: tuple[bool, ...], groups: tuple[StageGroup, ...]
    ) -> Candidate:
        time = replay(groups, self.num_micro_batches)
        return Candidate(layout, cuts, modes, groups, time, self.cost_s(layout, time.step_s))

    def step_seconds(self, layout: Layout, many: Sequence[Cuts]) -> Floats:
        """Seconds of a step for many cuts of one layout, shape (N,); infinite where one does not fit."""
        borders = np.array(many)
        wide = self.table.num_blocks + 1
        keys = borders[:, :-1] * wide + borders[:, 1:]
        # Many cuts share most of their stages: each distinct stage is priced once, and looked up by its number.
        options: list[list[StageOption | None]] = []
        chosen: list[Ints] = []
        for k in range(len(layout)):
            distinct, numbers = np.unique(keys[:, k], return_inverse=True)
            options.append([self.option(layout, k, *divmod(key, wide)) for key in distinct.tolist()])
            chosen.append(numbers)
        found = np.full(len(many), np.inf)
        fits = np.ones(len(many), dtype=bool)
        # What cuts must have in common to be replayed at once: which stages train, and which boundaries are in bf16.
        trained = np.zeros((len(many), 2 * len(layout)), dtype=bool)
        trained[:, len(layout) :] = np.isin(borders[:, 1:], self.shape.bf16_borders)
        for k, of_stage in enumerate(options):
            fits &= np.array([option is not None for option in of_stage])[chosen[k]]
            has_backward = [option is not None and option.group.replicas[0].has_backward for option in of_stage]
            trained[:, k] = np.array(has_backward)[chosen[k]]
        for alike in np.unique(trained[fits], axis=0):
            rows = np.flatnonzero(fits & (trained == alike).all(axis=1))
            found[rows] = self._replayed(options, [numbers[rows] for numbers in chosen])
        return found

    def _replayed(self, options: Sequence[Sequence[StageOption | None]], chosen: Sequence[Ints]) -> Floats:
        """Seconds of cuts whose stages are named by number; all fit, and train in the same stages."""
        groups: list[StageGroup] = []
        forward_s, backward_s, sum_s = [], [], []
        for of_stage, numbers in zip(options, chosen, strict=True):
            first = of_stage[int(numbers[0])]
            assert first is not None, "only asked of cuts that fit"
            groups.append(first.group)
            idle = (0.0,) * len(first.forward_s)
            forward_s.append(np.array([idle if o is None else o.forward_s for o in of_stage])[numbers])
            backward_s.append(np.array([idle if o is None else o.backward_s for o in of_stage])[numbers])
            sum_s.append(np.array([0.0 if o is None else o.group.sum_s for o in of_stage])[numbers])
        return replay_many(groups, forward_s, backward_s, np.array(sum_s).T, self.num_micro_batches)


def _with_forward(group: StageGroup, more_s: Sequence[float]) -> StageGroup:
    """A stage whose replicas' forward passes take so much longer each."""
    replicas = zip(group.replicas, more_s, strict=True)
    return replace(group, replicas=tuple(replace(cost, forward_s=cost.forward_s + s) for cost, s in replicas))


def _with_messages(
    links: tuple[tuple[tuple[float, float], ...], ...], share: float
) -> tuple[tuple[tuple[float, float], ...], ...]:
    """Links that carry a share of each message; of nothing the latency counts neither."""
    return tuple(tuple((share * busy_s, latency_s if share else 0.0) for busy_s, latency_s in row) for row in links)
