"""Whether any plan keeps every device within its budget, seconds apart.

Entry points: :func:`fits`, :func:`fits_with_any_rows`. With one device a stage, the furthest block that some devices
can reach from the first one on is all that matters of how they are arranged, because a stage that starts later never
reaches less far. So a dynamic program over sets of devices is exact. Where there are too many sets, blocks of one size
make it an assignment problem: devices to places in the pipeline, such that the blocks that fit add up to the most (Kuhn
1955; Munkres 1957).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from partitioner.device import DeviceProfile, LinkTable
from partitioner.layout import Layout
from partitioner.micro_batch import lightest_shapes
from partitioner.model import ModelTable
from partitioner.place import Ints, Place
from partitioner.pricing import Pricer
from partitioner.replay import Floats
from partitioner.rooms import StagePlaces
from partitioner.shape import JobShape

_MAX_SET_DEVICES = 7
_EVEN_STEP_BYTES = 1 << 16

_MAX_COUNTED = 24
"""Stages up to which every number of them is tried."""
_MAX_ASSIGNED = 64
"""Stages up to which places are assigned one by one; longer pipelines take their roomiest devices in order."""


def fits(table: ModelTable, shape: JobShape, devices: Sequence[DeviceProfile], links: LinkTable | None = None) -> bool:
    """Whether any plan keeps every device within its budget.

    Exact for up to seven devices, and for up to 24 where all blocks are of one size.

    Args:
        table: the model.
        shape: the job.
        devices: devices that may be used.
        links: not needed for the answer.
    """
    return fitting_layout(table, shape, devices, links) is not None


def fits_with_any_rows(
    table: ModelTable, shape: JobShape, devices: Sequence[DeviceProfile], links: LinkTable | None = None
) -> bool:
    """Whether the job fits with any micro-batch that divides its batch; arguments as for :func:`fits`."""
    return any(fits(table, lightest, devices, links) for lightest in lightest_shapes(table, shape))


def fitting_layout(
    table: ModelTable, shape: JobShape, devices: Sequence[DeviceProfile], links: LinkTable | None = None
) -> Layout | None:
    """Some layout that fits; None: see :func:`fits`."""
    usable = [i for i, device in enumerate(devices) if shape.dtype in device.dtypes]
    if not usable:
        return None
    pricer = Pricer(table, shape, devices, links or LinkTable())
    by_room = sorted(usable, key=lambda i: (-pricer.room_bytes[i], i))
    largest = min(len(by_room), table.num_blocks)
    if shape.exact_stages is not None and shape.exact_stages > largest:
        return None
    if _most_blocks(pricer, by_room) < table.num_blocks:
        return None
    counts = _stage_counts(largest) if shape.exact_stages is None else [shape.exact_stages]
    return next((found for n in counts if (found := _of_length(pricer, by_room, n)) is not None), None)


def smallest_even_room(pricer: Pricer, num_stages: int) -> int:
    """Least job bytes that each of so many equal devices must offer."""
    layout: Layout = tuple((0,) for _ in range(num_stages))
    places = [stage.places for stage in pricer.places(layout)]
    choice = pricer.choices[-1]
    whole = pricer.memory.job_bytes(0, pricer.table.num_blocks, num_stages=1, stage_index=0, checkpointing=choice)
    low, high = 0, whole * num_stages
    while high - low > _EVEN_STEP_BYTES:
        middle = (low + high) // 2
        stages = [StagePlaces(of_stage, (middle,)) for of_stage in places]
        if pricer.least_starts_of(stages) is None:
            low = middle
        else:
            high = middle
    return high


def sampled_counts(largest: int) -> list[int]:
    """All small numbers of stages, and some of the large ones."""
    return [n for n in (*range(1, 9), 12, 16, 24, 32, 48, 64) if n <= largest]


def _stage_counts(largest: int) -> list[int]:
    """Numbers of stages in the order in which they are tried: nearly always the most stages hold the most."""
    few = range(1, largest + 1) if largest <= _MAX_COUNTED else sampled_counts(largest)
    return list(dict.fromkeys([largest, min(largest, _MAX_ASSIGNED), *few]))


def _most_blocks(pricer: Pricer, devices: Sequence[int]) -> int:
    """Blocks that all devices together can hold at the most, each in the place that asks least of it."""
    num_blocks = pricer.table.num_blocks
    if not pricer.memory.is_uniform:
        return num_blocks
    rooms = np.array([pricer.room_bytes[i] for i in devices])
    most = np.zeros(len(rooms), dtype=np.int64)
    num_stages = len(devices) if pricer.shape.generate_rows else 0
    lightest = Place(num_stages, is_first=False, is_last=False, in_flight=1, gradient_copies=0, num_peers=0)
    for choice in pricer.choices:
        sizes = pricer.row(lightest, checkpointing=choice, start=0)
        most = np.maximum(most, np.searchsorted(sizes, rooms, side="right"))
    return int(most.sum())


def _of_length(pricer: Pricer, by_room: Sequence[int], num_stages: int) -> Layout | None:
    straight: Layout = tuple((i,) for i in by_room[:num_stages])
    for layout in (straight, straight[::-1]):
        if pricer.least_starts(layout) is not None:
            return layout
    if len(by_room) <= _MAX_SET_DEVICES:
        return _by_sets(pricer, by_room, num_stages)
    if num_stages > _MAX_ASSIGNED:
        return None
    caps = _caps(pricer, by_room[:_MAX_ASSIGNED], num_stages)
    # Nobody holds more than in the place where it holds the most.
    if pricer.memory.is_uniform and int(np.sort(caps.max(axis=1))[-num_stages:].sum()) < pricer.table.num_blocks:
        return None
    # A device that can hold nothing in a place must not get it, however much that place would let others hold.
    barred = -float(pricer.table.num_blocks * num_stages)
    rows = assign(np.where(caps > 0, caps.astype(float), barred))
    layout = tuple((by_room[row],) for row in rows)
    return layout if pricer.least_starts(layout) is not None else None


def _caps(pricer: Pricer, devices: Sequence[int], num_stages: int) -> Ints:
    """Blocks that each device can hold in each place, (devices, stages)."""
    num_blocks = pricer.table.num_blocks
    rooms = np.array([pricer.room_bytes[i] for i in devices])
    caps = np.zeros((len(devices), num_stages), dtype=np.int64)
    places = pricer.places(tuple((i,) for i in devices[:num_stages]))
    for k, stage in enumerate(places):
        (place,) = stage.places
        for choice in pricer.choices:
            if place.is_last:
                sizes = pricer.column(place, checkpointing=choice, end=num_blocks)[::-1]
                sizes = sizes[-1:] if place.is_first else sizes
                held = np.searchsorted(sizes, rooms, side="right") * (num_blocks if place.is_first else 1)
            else:
                sizes = pricer.row(place, checkpointing=choice, start=0 if place.is_first else 1)
                held = np.searchsorted(sizes, rooms, side="right")
            caps[:, k] = np.maximum(caps[:, k], held)
    return caps


def _by_sets(pricer: Pricer, devices: Sequence[int], num_stages: int) -> Layout | None:
    """The layout over sets of devices that reaches furthest; None if it does not reach the last block."""
    num_blocks = pricer.table.num_blocks
    places = [stage.places for stage in pricer.places(tuple((i,) for i in devices[:num_stages]))]
    reached: dict[frozenset[int], tuple[int, Layout]] = {frozenset(): (0, ())}
    for k in range(num_stages):
        is_last = k == num_stages - 1
        following: dict[frozenset[int], tuple[int, Layout]] = {}
        for used, (start, layout) in reached.items():
            for device in devices:
                if device in used:
                    continue
                stage = StagePlaces(places[k], (pricer.room_bytes[device],))
                end = min(pricer.furthest_end(stage, start), num_blocks - (num_stages - 1 - k))
                if end == start or (is_last and end < num_blocks):
                    continue
                key = used | {device}
                if key not in following or end > following[key][0]:
                    following[key] = (end, (*layout, (device,)))
        reached = following
    return next((layout for end, layout in reached.values() if end == num_blocks), None)


def assign(values: Floats) -> list[int]:
    """The row for each column such that the values add up to the most, each row at most once.

    Args:
        values: (rows, columns), at least as many rows as columns.
    """
    cost = -values.T
    num_columns, num_rows = cost.shape
    potential_of_column, potential_of_row = np.zeros(num_columns + 1), np.zeros(num_rows + 1)
    column_of_row = np.zeros(num_rows + 1, dtype=np.int64)
    for column in range(1, num_columns + 1):
        column_of_row[0] = column
        row = 0
        shortest = np.full(num_rows + 1, np.inf)
        came_from = np.zeros(num_rows + 1, dtype=np.int64)
        is_done = np.zeros(num_rows + 1, dtype=bool)
        while True:
            is_done[row] = True
            here = column_of_row[row]
            reduced = cost[here - 1] - potential_of_column[here] - potential_of_row[1:]
            closer = ~is_done[1:] & (reduced < shortest[1:])
            shortest[1:][closer] = reduced[closer]
            came_from[1:][closer] = row
            following = int(np.where(is_done[1:], np.inf, shortest[1:]).argmin()) + 1
            delta = shortest[following]
            potential_of_column[column_of_row[is_done]] += delta
            potential_of_row[is_done] -= delta
            shortest[~is_done] -= delta
            row = following
            if column_of_row[row] == 0:
                break
        while row:
            column_of_row[row] = column_of_row[came_from[row]]
            row = int(came_from[row])
    row_of_column = [0] * num_columns
    for row in range(1, num_rows + 1):
        if column_of_row[row]:
            row_of_column[int(column_of_row[row]) - 1] = row - 1
    return row_of_column
