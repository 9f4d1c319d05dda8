"""What a layout with its cuts costs: which stages fit, with or without checkpointing, and how long a step takes.

Entry point: :class:`Pricer`, one for a job's shape on a fleet. Every part of the planner asks it, so that a plan is
priced by the same numbers wherever it was found.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from partitioner.cached_epoch import (
    READ_BYTES_PER_S,
    SideDevice,
    cached_step,
    num_side_params,
    read_s,
    side_device,
    side_worker_bytes,
)
from partitioner.cached_stages import SideStage, cuts_by_speed, part_of, side_message_bytes, staged_step
from partitioner.cost import SUM_MESSAGE_BYTES, StageCost, message_bytes, stage_cost
from partitioner.device import DeviceProfile, LinkProfile, LinkTable
from partitioner.layout import Cuts, Group, Layout, ahead_of
from partitioner.model import JobShape, ModelTable
from partitioner.place import Ints
from partitioner.plan import CachedStep, UpperStep
from partitioner.replay import Floats, StageGroup, StepTime, replay, replay_many
from partitioner.rooms import Rooms
from partitioner.sum_path import sum_factors

_FP32_BYTES = 4


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


class Pricer(Rooms):
    """Bytes and seconds of stages of one job on one fleet.

    Args:
        table: the model.
        shape: the job.
        devices: devices that may be used; the timings are of the shape's micro-batch.
        links: links between them.
    """

    def __init__(self, table: ModelTable, shape: JobShape, devices: Sequence[DeviceProfile], links: LinkTable) -> None:
        super().__init__(table, shape, devices)
        self.links = links
        self.message_bytes = message_bytes(table, shape)
        self.rounded_bytes = message_bytes(table, shape, "bf16")
        """Of a message over a boundary in bf16."""
        self._costs: dict[tuple[int, int, int, bool], StageCost] = {}
        self._sum_factors: dict[tuple[Group, tuple[int, ...]], tuple[float, float]] = {}
        self._cached: dict[frozenset[int], CachedStep | None] = {}
        self._staged: dict[tuple[Layout, Cuts | None], CachedStep] = {}
        self._side_parts: dict[tuple[int, int, int], SideDevice] = {}
        self._options: dict[Layout, list[dict[int, StageOption | None]]] = {}

    @cached_property
    def _profiles(self) -> list[list[LinkProfile]]:
        return self.links.matrix(self.devices)

    @cached_property
    def bandwidth(self) -> Floats:
        """Bytes a second between any two devices."""
        return np.array([[link.bandwidth_bytes_per_s for link in row] for row in self._profiles])

    @cached_property
    def busy_s(self) -> Floats:
        """Seconds that one message occupies the link between any two devices."""
        return self.message_bytes / self.bandwidth

    @cached_property
    def latency_s(self) -> Floats:
        """Seconds until a message's last byte is there after it has left."""
        return np.array([[link.latency_s for link in row] for row in self._profiles])

    @cached_property
    def least_busy_s(self) -> Floats:
        """The same of the smallest message that any boundary carries."""
        return (self.rounded_bytes if self.shape.bf16_borders else self.message_bytes) / self.bandwidth

    @cached_property
    def _links(self) -> tuple[list[list[tuple[float, float]]], list[list[tuple[float, float]]]]:
        """Of boundaries in the job's codec, and of those in bf16."""
        found = []
        for num_bytes in (self.message_bytes, self.rounded_bytes):
            rows = zip((num_bytes / self.bandwidth).tolist(), self.latency_s.tolist(), strict=True)
            found.append([list(zip(*row, strict=True)) for row in rows])
        return found[0], found[1]

    def codec_at(self, border: int) -> str:
        """What a boundary at a block border carries."""
        return "bf16" if border in self.shape.bf16_borders else self.shape.codec

    @cached_property
    def _params_before(self) -> Floats:
        """Adapter parameters of the blocks before each block, and of all at the end."""
        found: Floats = np.concatenate([[0.0], np.cumsum(self.shape.adapter_params)])
        return found

    def cached_step(self, layout: Layout, cuts: Cuts | None = None) -> CachedStep | None:
        """The quickest step from the activation cache over the layout's devices; None: the job has none, or no room.

        Args:
            layout: the pipeline's.
            cuts: its stages' borders; None: a guess in proportion to the devices' speeds.
        """
        if not self.shape.side_reduction:
            return None
        ways = []
        if "data-parallel" in self.shape.cached_ways and (found := self._data_parallel_step(layout)) is not None:
            ways.append(found)
        if "stages" in self.shape.cached_ways:
            ways.append(self._staged_step(layout, cuts))
        return min(ways, key=lambda way: way.step_s, default=None)

    def _data_parallel_step(self, layout: Layout) -> CachedStep | None:
        used = frozenset(device for group in layout for device in group)
        if used not in self._cached:
            roomy = [i for i in sorted(used) if self.room_bytes[i] >= self._side_worker_bytes]
            self._cached[used] = cached_step(
                [self._side_devices[i] for i in roomy],
                self.bandwidth[np.ix_(roomy, roomy)].tolist(),
                num_micro_batches=self.num_micro_batches,
                gradient_bytes=_FP32_BYTES * num_side_params(self.shape),
            )
        return self._cached[used]

    @cached_property
    def _side_worker_bytes(self) -> int:
        return side_worker_bytes(self.table, self.shape)

    @cached_property
    def _side_devices(self) -> list[SideDevice]:
        """Every device with the whole side network."""
        return [
            side_device(self.table, self.shape, device, self.shape.entry_token_bytes, READ_BYTES_PER_S)
            for device in self.devices
        ]

    def _staged_step(self, layout: Layout, cuts: Cuts | None) -> CachedStep:
        key = layout, cuts
        if key not in self._staged:
            speeds = [1.0 / max(device.micro_batch_s, 1e-12) for device in self._side_devices]
            borders = cuts or cuts_by_speed(layout, speeds, self.table.num_blocks)
            self._staged[key] = staged_step([self._side_stage(layout, k, borders) for k in range(len(layout))])
        return self._staged[key]

    def _side_stage(self, layout: Layout, k: int, cuts: Cuts) -> SideStage:
        group, (start, end) = layout[k], cuts[k : k + 2]
        below = layout[k + 1] if k + 1 < len(layout) else ()
        links = self._side_links
        return SideStage(
            replicas=tuple([self._side_part(i, start, end) for i in group]),
            owners=self.owners(group, is_alone=len(layout) == 1),
            link_busy_s=max([links[i][j][0] for i in group for j in below], default=0.0),
            link_latency_s=max([links[i][j][1] for i in group for j in below], default=0.0),
            sum_s=self.sum_s(layout, k, start, end),
        )

    def _side_part(self, device: int, start: int, end: int) -> SideDevice:
        key = device, start, end
        if key not in self._side_parts:
            timings = self.devices[device].timings
            head_s = timings.head_forward_s + timings.head_backward_s
            self._side_parts[key] = part_of(
                self._side_devices[device], self.table, self.shape, start, end, head_s=head_s
            )
        return self._side_parts[key]

    @cached_property
    def _side_links(self) -> list[list[tuple[float, float]]]:
        """Seconds that a micro-batch's side state occupies the link between any two devices, and its latency."""
        busy_s = side_message_bytes(self.table, self.shape) / self.bandwidth
        return [list(zip(*rows, strict=True)) for rows in zip(busy_s.tolist(), self.latency_s.tolist(), strict=True)]

    def cost_s(self, layout: Layout, step_s: float) -> float:
        """Mean seconds of all steps of a job, where one through the blocks takes ``step_s``.

        Where nobody has room for the side network, later steps count as if the blocks ran in them too.
        """
        share = self.shape.cached_steps_share
        if not share or (cached := self.cached_step(layout)) is None:
            return step_s
        return (step_s + share * cached.step_s) / (1 + share)

    def step_limit_s(self, layout: Layout, limit_s: float) -> float:
        """The step through the blocks with which a layout's cost is ``limit_s``."""
        share = self.shape.cached_steps_share
        if not share or (cached := self.cached_step(layout)) is None:
            return limit_s
        return limit_s * (1 + share) - share * cached.step_s

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

    def cost(self, device: int, start: int, end: int, *, checkpointing: bool) -> StageCost:
        """Seconds of a stage on one device, its links apart."""
        key = (device, start, end, checkpointing)
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
            replicas=tuple(self.cost(device, start, end, checkpointing=checkpointing) for device in group),
            owners=self.owners(group, is_alone=len(layout) == 1),
            links=self.links_below(layout, k, is_rounded=end in self.shape.bf16_borders),
            ahead=ahead_of(layout, k, runs_ahead=self.shape.runs_ahead),
            sum_s=self.sum_s(layout, k, start, end),
        )

    def links_below(self, layout: Layout, k: int, *, is_rounded: bool) -> tuple[tuple[tuple[float, float], ...], ...]:
        """Seconds on the links behind stage k, see :attr:`StageGroup.links`: of bf16, or of the job's codec."""
        below = layout[k + 1] if k + 1 < len(layout) else ()
        links = self._links[is_rounded]
        return tuple(tuple(links[device][other] for other in below) for device in layout[k])

    def sum_s(self, layout: Layout, k: int, start: int, end: int) -> float:
        """Seconds in which the replicas of a stage add up their gradients, in fp32; see :mod:`partitioner.sum_path`."""
        if len(layout[k]) == 1:
            return 0.0
        seconds, params = self.sum_s_by_blocks(layout, k), self._params_at(layout, k)
        last_bytes = min(SUM_MESSAGE_BYTES, _FP32_BYTES * float(params[end] - params[start]))
        return float(seconds[end] - seconds[start]) + last_bytes * self._sum_factors[self._sum_key(layout, k)][1]

    def sum_s_by_blocks(self, layout: Layout, k: int) -> Floats:
        """Prefix sums over blocks of :meth:`sum_s` without the last message: [end] - [start] is that of a stage.

        Latencies are left out.
        """
        if len(layout[k]) == 1:
            return np.zeros(self.table.num_blocks + 1)
        key = self._sum_key(layout, k)
        if key not in self._sum_factors:
            group, owners = key
            if self.shape.replicas_fold:
                owners = tuple(range(len(group)))
            self._sum_factors[key] = sum_factors(owners, (1.0 / self.bandwidth[np.ix_(group, group)]).tolist())
        return self._params_at(layout, k) * (_FP32_BYTES * self._sum_factors[key][0])

    def _sum_key(self, layout: Layout, k: int) -> tuple[Group, tuple[int, ...]]:
        return layout[k], self.owners(layout[k], is_alone=len(layout) == 1)

    def _params_at(self, layout: Layout, k: int) -> Floats:
        """Prefix sums of a stage's adapter parameters; those outside the blocks count with the first or last block."""
        params: Floats = self._params_before.copy()
        if k == 0:
            params[1:] += self.shape.first_trainable_params
        if k == len(layout) - 1:
            params[-1] += self.shape.last_trainable_params
        return params

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
        groups = []
        for k, group in enumerate(later.groups):
            if k == at:
                seconds = read_s(shape, 1)
                read = [replace(cost, forward_s=cost.forward_s + seconds) for cost in group.replicas]
                group = replace(group, replicas=tuple(read))
            # No hidden states cross a border at or below the place.
            is_idle = found.cuts[k + 1] <= place
            groups.append(replace(group, links=_free(group.links)) if is_idle else group)
        return UpperStep(
            place=place,
            step_s=replay(groups, self.num_micro_batches).step_s,
            row_bytes=shape.row_tokens * shape.entry_token_bytes,
        )

    def _at_share(self, frozen_share: float) -> Pricer:
        return Pricer(
            self.table, self.shape.model_copy(update={"frozen_share": frozen_share}), self.devices, self.links
        )

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


def _free(links: tuple[tuple[tuple[float, float], ...], ...]) -> tuple[tuple[tuple[float, float], ...], ...]:
    return tuple(tuple((0.0, 0.0) for _ in row) for row in links)
