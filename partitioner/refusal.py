"""Why a job does not fit, in numbers, and the one change that would make it fit.

Every change that is named was tried: the search ran again with it and found a plan.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, NoReturn

from partitioner.device import DeviceProfile, LinkTable
from partitioner.fitting import fits, sampled_counts, smallest_even_room
from partitioner.micro_batch import candidate_rows, lightest_shapes, with_rows
from partitioner.model import ModelTable
from partitioner.pricing import Pricer
from partitioner.shape import JobShape
from plutino.dtypes import why_not_run
from plutino.errors import InfeasiblePlanError
from plutino.sizes import MIB, format_size

_TOKEN_STEP = 16
"""Lengths are proposed in steps of so many tokens."""

_MAX_OFFERS = 20
"""Devices that a refusal names one by one."""

_DEVICE_STEP_BYTES = 32 * MIB
"""Sizes of one more device are proposed in steps of so much."""


def refuse(
    table: ModelTable, shapes: Sequence[JobShape], devices: Sequence[DeviceProfile], links: LinkTable
) -> NoReturn:
    """Explain that nothing fits.

    Args:
        table: the model.
        shapes: the job with each micro-batch that could have fitted; told of is the one that needs least.
        devices: devices that may be used.
        links: links between them.

    Raises:
        InfeasiblePlanError: always; what the job needs, what each device offers, and what would make it fit.
    """
    if not devices:
        raise InfeasiblePlanError("no device is in; start an agent (plutino-node run) on each device")
    (shape, *_), largest = shapes, min(len(devices), table.num_blocks)
    if shape.exact_stages is not None and shape.exact_stages > largest:
        raise InfeasiblePlanError(
            f"the job asks for exactly {shape.exact_stages} stages, but {len(devices)} devices and {table.num_blocks} "
            f"blocks make at most {largest}; lower placement.stages or leave it out"
        )
    usable = [device for device in devices if shape.dtype in device.dtypes]
    like, num_devices = (usable or devices)[0], max(1, len(usable))
    shape = min(shapes, key=lambda one: _least_room(table, one, like, num_devices))
    need = _need(table, shape, like, num_devices)
    offers = "; ".join(_offer(device, shape) for device in devices[:_MAX_OFFERS])
    if len(devices) > _MAX_OFFERS:
        rest_bytes = sum(device.available_bytes for device in devices[_MAX_OFFERS:])
        offers += f"; and {len(devices) - _MAX_OFFERS} more with {format_size(rest_bytes)} together"
    changes = _changes(table, shape, devices, links)
    way_out = (
        f"any one of these makes it fit: {'; '.join(changes)}"
        if changes
        else "no single change makes it fit: use a smaller model, or several more devices"
    )
    raise InfeasiblePlanError(f"the job does not fit. It needs {need}. Offered: {offers}. Way out: {way_out}")


def _least_room(table: ModelTable, shape: JobShape, device: DeviceProfile, num_devices: int) -> tuple[int, int]:
    """Least job bytes that each of so many devices must offer, and the number of stages at which it is least."""
    pricer = Pricer(table, shape, [device], LinkTable())
    counts = [shape.exact_stages] if shape.exact_stages else sampled_counts(min(num_devices, table.num_blocks))
    return min((smallest_even_room(pricer, count), count) for count in counts)


def _need(table: ModelTable, shape: JobShape, device: DeviceProfile, num_devices: int) -> str:
    needed_bytes, num_stages = _least_room(table, shape, device, num_devices)
    how = {
        "on": "with checkpointing",
        "off": "without checkpointing",
        "auto": "with checkpointing where that takes less",
    }[shape.checkpointing]
    if num_stages == 1:
        return f"at least {format_size(needed_bytes)} beyond a worker's baseline, {how}"
    return (
        f"at least {format_size(needed_bytes)} beyond a worker's baseline on the fullest device, "
        f"cut as evenly as memory allows into {num_stages} stages, {how}"
    )


def _offer(device: DeviceProfile, shape: JobShape) -> str:
    text = (
        f"{device.name} {format_size(device.available_bytes)} "
        f"({format_size(max(0, device.available_bytes - device.baseline_bytes))} beyond its baseline)"
    )
    if shape.dtype in device.dtypes:
        return text
    return f"{text}, but it {why_not_run(shape.dtype, device.dtypes, dict(device.slow_dtypes))}"


def _changes(table: ModelTable, shape: JobShape, devices: Sequence[DeviceProfile], links: LinkTable) -> list[str]:
    """Single changes of a setting, or one more device, with which the job fits."""

    def try_shape(changed: JobShape) -> bool:
        return fits(table, changed, devices, links)

    changes = [
        _checkpointing_change(shape, try_shape),
        _rows_change(table, shape, try_shape),
        _tokens_change(shape, try_shape),
        _dtype_change(shape, try_shape),
        _rank_change(shape, try_shape),
        _device_change(table, shape, devices, links),
    ]
    return [change for change in changes if change is not None]


def _checkpointing_change(shape: JobShape, try_shape: Callable[[JobShape], bool]) -> str | None:
    if shape.checkpointing != "off" or not try_shape(shape.model_copy(update={"checkpointing": "on"})):
        return None
    return "training.checkpointing: on"


def _rows_change(table: ModelTable, shape: JobShape, try_shape: Callable[[JobShape], bool]) -> str | None:
    smaller = [
        rows for rows in candidate_rows(shape.batch_rows, shape.rows_per_sample) if rows < shape.micro_batch_rows
    ]
    lightest = [one.micro_batch_rows for one in lightest_shapes(table, shape)]
    rows = next((rows for rows in (*smaller, *lightest) if try_shape(with_rows(shape, rows))), None)
    return None if rows is None else f"training.micro_batch_size: {rows} (now {shape.micro_batch_rows})"


def _tokens_change(shape: JobShape, try_shape: Callable[[JobShape], bool]) -> str | None:
    def shortened(row_tokens: int) -> JobShape:
        label_tokens = min(shape.label_tokens, shape.micro_batch_rows * row_tokens)
        return shape.model_copy(update={"row_tokens": row_tokens, "label_tokens": label_tokens})

    steps = _largest(0, (shape.row_tokens - 1) // _TOKEN_STEP, lambda n: try_shape(shortened(n * _TOKEN_STEP)))
    return f"data.max_tokens: {steps * _TOKEN_STEP} (now {shape.row_tokens})" if steps else None


def _dtype_change(shape: JobShape, try_shape: Callable[[JobShape], bool]) -> str | None:
    other: Literal["fp32", "bf16"] = "bf16" if shape.dtype == "fp32" else "fp32"
    # Only bf16 saves memory, but fp32 can let devices in that do not run bf16.
    return f"model.dtype: {other}" if try_shape(shape.model_copy(update={"dtype": other})) else None


def _rank_change(shape: JobShape, try_shape: Callable[[JobShape], bool]) -> str | None:
    """Ranks divided by a power of two; with several ranks in the job all of them are."""
    largest_rank_sum = max(shape.adapter_rank_out, default=0)
    divisor = 2
    while largest_rank_sum and divisor <= largest_rank_sum:
        changed = shape.model_copy(
            update={
                "adapter_params": tuple(-(-params // divisor) for params in shape.adapter_params),
                "adapter_rank_out": tuple(-(-ranks // divisor) for ranks in shape.adapter_rank_out),
            }
        )
        if try_shape(changed):
            return f"method.{shape.size_setting} divided by {divisor}"
        divisor *= 2
    return None


def _device_change(
    table: ModelTable, shape: JobShape, devices: Sequence[DeviceProfile], links: LinkTable
) -> str | None:
    usable = [device for device in devices if shape.dtype in device.dtypes]
    if not usable:
        return None
    baseline_bytes = max(device.baseline_bytes for device in usable)

    def joined(steps: int) -> bool:
        extra = usable[0].model_copy(
            update={
                "agent_id": "one more device",
                "host_id": "one more host",
                "available_bytes": steps * _DEVICE_STEP_BYTES,
                "baseline_bytes": baseline_bytes,
            }
        )
        return fits(table, shape, [*usable, extra], links)

    whole_bytes = baseline_bytes + smallest_even_room(Pricer(table, shape, usable[:1], links), 1)
    most = -(-whole_bytes // _DEVICE_STEP_BYTES) + 1
    if not joined(most):
        return None
    steps = most - _largest(0, most, lambda fewer: joined(most - fewer))
    return f"one more device of {format_size(steps * _DEVICE_STEP_BYTES)}"


def _largest(low: int, high: int, holds: Callable[[int], bool]) -> int:
    """Largest n in [low, high] with holds(n), by bisection; ``low`` is taken to hold, and larger n to hold less."""
    while low < high:
        middle = (low + high + 1) // 2
        if holds(middle):
            low = middle
        else:
            high = middle - 1
    return low
