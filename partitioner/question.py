"""What a search is asked, as a value: a model, a job's choices of micro-batch and codec, devices and links.

Entry points: :func:`open_question`, :func:`considered`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Literal

from partitioner.block_seconds import mean_block
from partitioner.climb import Limits
from partitioner.device import DeviceProfile, LinkTable
from partitioner.micro_batch import candidate_rows, lightest_shapes, scaled_devices, with_rows
from partitioner.model import ModelTable
from partitioner.pricing import Pricer
from partitioner.shape import JobShape
from partitioner.spread import PartResult, SearchPart, run_part

_MAX_CONSIDERED = 40
"""Devices that a search looks at, unless the model needs more."""

Codec = Literal["raw", "bf16"]


@dataclass(frozen=True, slots=True)
class Question:
    """All that a search is asked."""

    table: ModelTable
    inputs: tuple[tuple[JobShape, tuple[DeviceProfile, ...]], ...]
    """Choices of micro-batch and codec, each with the devices' seconds at its size; the smallest size last."""
    links: LinkTable
    allow_replicas: bool

    @property
    def is_codec_open(self) -> bool:
        """Whether boundaries may carry what is exact, and something else too."""
        return {"raw", "bf16"} <= {shape.codec for shape, _ in self.inputs}

    @property
    def lightest_shapes(self) -> tuple[JobShape, ...]:
        """If none of these fits, nothing does."""
        last, _ = self.inputs[-1]
        is_open = len({shape.micro_batch_rows for shape, _ in self.inputs}) > 1
        return lightest_shapes(self.table, last) if is_open else (last,)

    @property
    def limits(self) -> Limits:
        """Which layouts are allowed."""
        shape, devices = self.inputs[-1]
        return Limits(
            max_stages=min(len(devices), self.table.num_blocks),
            exact_stages=shape.exact_stages,
            allow_replicas=self.allow_replicas,
        )

    def priced(self) -> Iterator[tuple[JobShape, Pricer]]:
        """The choices that any device can compute, on the devices that a search looks at."""
        for shape, devices in self.inputs:
            usable = considered(self.table, shape, [device for device in devices if shape.dtype in device.dtypes])
            if usable:
                yield shape, Pricer(self.table, shape, usable, self.links)

    def run_part(self, part: SearchPart) -> PartResult:
        """What a part of a long search finds, wherever this runs."""
        _, pricer = next(islice(self.priced(), part.variant, None))
        return run_part(part, pricer, self.limits)


def open_question(
    table: ModelTable,
    shape: JobShape,
    devices: Sequence[DeviceProfile],
    links: LinkTable | None = None,
    *,
    label_tokens_of: Callable[[int], int] | None = None,
    codecs: Sequence[Codec] = (),
    allow_replicas: bool = False,
) -> Question:
    """The question of :func:`choose_micro_batch`."""
    inputs = tuple(
        (
            with_rows(shape, rows, label_tokens_of).model_copy(update={"codec": codec}),
            tuple(scaled_devices(devices, shape.micro_batch_rows, rows)),
        )
        for rows in candidate_rows(shape.batch_rows, shape.rows_per_sample)
        for codec in codecs or (shape.codec,)
    )
    return Question(table, inputs, links or LinkTable(), allow_replicas)


def considered(table: ModelTable, shape: JobShape, devices: Sequence[DeviceProfile]) -> list[DeviceProfile]:
    """The fastest and the roomiest devices of a large fleet, as many as a search can look at, in their given order."""
    if len(devices) <= _MAX_CONSIDERED:
        return list(devices)
    by_room = sorted(range(len(devices)), key=lambda i: (devices[i].baseline_bytes - devices[i].available_bytes, i))
    by_speed = sorted(range(len(devices)), key=lambda i: (mean_block(table, devices[i].timings).forward_s, i))
    weight_bytes = sum(table.block_params) * shape.dtype_bytes
    needed, room_bytes = 0, 0
    for i in by_room:
        needed += 1
        room_bytes += max(0, devices[i].available_bytes - devices[i].baseline_bytes)
        if room_bytes > 2 * weight_bytes:
            break
    # Half of them for speed; of the roomy ones as many as hold the frozen weights twice over.
    roomy = max(_MAX_CONSIDERED // 2, needed)
    chosen = {*by_room[:roomy], *by_speed[: _MAX_CONSIDERED // 2]}
    return [device for i, device in enumerate(devices) if i in chosen]
