"""Which blocks fit where: bytes of the stages of one job, place by place, against what each device has left.

Entry point: :class:`Rooms`. Bytes are kept as rows of arrays, because a search asks for many.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from partitioner.block_seconds import mean_block
from partitioner.device import DeviceProfile, LinkTable
from partitioner.layout import Cuts, Group, Layout, owners_of, replica_shares
from partitioner.memory import MemoryModel
from partitioner.model import ModelTable
from partitioner.place import Ints, Place, place_of
from partitioner.shape import JobShape


@dataclass(frozen=True, slots=True)
class StagePlaces:
    """Where the replicas of one stage of a layout stand, and what each has left for the job."""

    places: tuple[Place, ...]
    room_bytes: tuple[int, ...]


def checkpointing_choices(shape: JobShape) -> tuple[bool, ...]:
    """Whether blocks may be recomputed, the cheaper choice first."""
    return {"on": (True,), "off": (False,), "auto": (False, True)}[shape.checkpointing]


class Rooms:
    """Bytes of stages of one job on one fleet.

    Of the choices of checkpointing only the first that fits counts: a stage that need not recompute is faster in
    every place, and no other stage depends on it.

    Args:
        table: the model.
        shape: the job.
        devices: devices that may be used; the timings are of the shape's micro-batch.
        links: links between them, for what is asked beyond bytes.
    """

    def __init__(self, table: ModelTable, shape: JobShape, devices: Sequence[DeviceProfile], links: LinkTable) -> None:
        self.table = table
        self.shape = shape
        self.devices = devices
        self.links = links
        self.choices = checkpointing_choices(shape)
        self.memory = MemoryModel(table, shape)
        self.room_bytes = tuple(device.available_bytes - device.baseline_bytes for device in devices)
        self.block_s = tuple(mean_block(table, device.timings).both_ways_s for device in devices)
        self._rows: dict[tuple[Place, bool, int], Ints] = {}
        self._columns: dict[tuple[Place, bool, int], Ints] = {}
        self._owners: dict[Group, tuple[int, ...]] = {}
        self._places: dict[Layout, tuple[StagePlaces, ...]] = {}

    @property
    def num_micro_batches(self) -> int:
        """Micro-batches of a step."""
        return self.shape.num_micro_batches

    def owners(self, group: Group, *, is_alone: bool = False) -> tuple[int, ...]:
        """Replica that runs each micro-batch: shares follow the devices' seconds for one block.

        Args:
            group: the replicas.
            is_alone: there is no other stage, whose micro-batches come one by one: each replica has neighbouring ones.
        """
        if group not in self._owners:
            self._owners[group] = owners_of([self.block_s[device] for device in group], self.num_micro_batches)
        found = self._owners[group]
        return tuple(sorted(found)) if is_alone else found

    def places(self, layout: Layout) -> tuple[StagePlaces, ...]:
        """Where all workers of a layout stand."""
        if layout not in self._places:
            found = []
            for k, group in enumerate(layout):
                owners = self.owners(group, is_alone=len(layout) == 1)
                shares = replica_shares(layout, k, owners, runs_ahead=self.shape.runs_ahead)
                places = tuple(place_of(len(layout), k, self.num_micro_batches, share) for share in shares)
                found.append(StagePlaces(self._merged(places), tuple(self.room_bytes[device] for device in group)))
            self._places[layout] = tuple(found)
        return self._places[layout]

    def _merged(self, places: tuple[Place, ...]) -> tuple[Place, ...]:
        """Places as keys: the number of stages matters to generation only."""
        if self.shape.generate_rows:
            return places
        return tuple(
            Place(0, place.is_first, place.is_last, place.in_flight, place.gradient_copies, place.num_peers)
            for place in places
        )

    def row(self, place: Place, *, checkpointing: bool, start: int) -> Ints:
        """Job bytes of stages [start, start + 1 + i) by i; they never fall as i grows."""
        if start > 0 and self.memory.is_uniform:
            return self.row(place, checkpointing=checkpointing, start=0)[: self.table.num_blocks - start]
        key = (place, checkpointing, start)
        if key not in self._rows:
            ends = np.arange(start + 1, self.table.num_blocks + 1)
            self._rows[key] = self.memory.bytes_of(np.asarray(start), ends, place, checkpointing=checkpointing)
        return self._rows[key]

    def column(self, place: Place, *, checkpointing: bool, end: int) -> Ints:
        """Job bytes of stages [start, end) by start; they never rise as start grows."""
        if self.memory.is_uniform:
            return self.row(place, checkpointing=checkpointing, start=0)[:end][::-1]
        key = (place, checkpointing, end)
        if key not in self._columns:
            starts = np.arange(0, end)
            self._columns[key] = self.memory.bytes_of(starts, np.asarray(end), place, checkpointing=checkpointing)
        return self._columns[key]

    def mode(self, stage: StagePlaces, start: int, end: int) -> bool | None:
        """Whether the stage recomputes; None if it fits in no way."""
        for choice in self.choices:
            if all(
                self.row(place, checkpointing=choice, start=start)[end - start - 1] <= room
                for place, room in zip(stage.places, stage.room_bytes, strict=True)
            ):
                return choice
        return None

    def keeps_heap(self, layout: Layout, k: int, replica: int, start: int, end: int, *, checkpointing: bool) -> bool:
        """Whether that worker's budget has room for all that malloc keeps if it gives nothing back."""
        if self.devices[layout[k][replica]].is_card:
            return False
        stage, blocks = self.places(layout)[k], (np.asarray(start), np.asarray(end))
        needed_bytes = self.memory.bytes_of(
            *blocks, stage.places[replica], checkpointing=checkpointing, keeps_heap=True
        )
        return int(needed_bytes) <= stage.room_bytes[replica]

    def furthest_end(self, stage: StagePlaces, start: int) -> int:
        """The largest end for which blocks [start, end) fit; ``start`` if not one block does."""
        best = start
        for choice in self.choices:
            count = min(
                int(np.searchsorted(self.row(place, checkpointing=choice, start=start), room, side="right"))
                for place, room in zip(stage.places, stage.room_bytes, strict=True)
            )
            best = max(best, start + count)
        return best

    def earliest_start(self, stage: StagePlaces, end: int) -> int:
        """The smallest start for which blocks [start, end) fit; ``end`` if not one block does."""
        best = end
        for choice in self.choices:
            # Bytes fall from start to start: those that fit are the last ones.
            count = min(
                int(np.searchsorted(self.column(place, checkpointing=choice, end=end)[::-1], room, side="right"))
                for place, room in zip(stage.places, stage.room_bytes, strict=True)
            )
            best = min(best, end - count)
        return best

    def least_starts(self, layout: Layout) -> tuple[int, ...] | None:
        """For every stage the smallest start from which it and those behind it can hold the rest; None: not at all."""
        return self.least_starts_of(self.places(layout))

    def least_starts_of(self, stages: Sequence[StagePlaces]) -> tuple[int, ...] | None:
        """The same of stages in the order of the pipeline."""
        num_stages, end = len(stages), self.table.num_blocks
        found = []
        for k in reversed(range(num_stages)):
            start = self._least_start(stages[k], end, num_stages, k)
            if start is None:
                return None
            end = start
            found.append(start)
        return tuple(reversed(found)) if end == 0 else None

    def _least_start(self, stage: StagePlaces, end: int, num_stages: int, k: int) -> int | None:
        """``end`` is the smallest border with which the stages behind can do; a later one may let this one start."""
        num_blocks = self.table.num_blocks
        latest_end = num_blocks - (num_stages - 1 - k)
        # A stage of one block may need a later end than the least one only to have a block at all.
        end = max(end, k + 1)
        if end > latest_end:
            return None
        start = max(k, self.earliest_start(stage, end))
        while start >= end:
            # Not even the block before ``end`` fits; blocks further on may be lighter.
            end += 1
            if end > latest_end or self.memory.is_uniform:
                return None
            start = max(k, self.earliest_start(stage, end))
        return start

    def clamped(self, layout: Layout, wanted: Sequence[int]) -> Cuts | None:
        """The cuts nearest to the wanted ones from the front that fit every budget; None if none do."""
        least = self.least_starts(layout)
        if least is None:
            return None
        num_stages, num_blocks = len(layout), self.table.num_blocks
        places, cuts = self.places(layout), [0]
        for k in range(num_stages - 1):
            latest = min(self.furthest_end(places[k], cuts[k]), num_blocks - (num_stages - 1 - k))
            earliest = max(least[k + 1], cuts[k] + 1)
            if earliest > latest:
                return None
            cuts.append(min(max(wanted[k + 1], earliest), latest))
        cuts.append(num_blocks)
        return tuple(cuts)
