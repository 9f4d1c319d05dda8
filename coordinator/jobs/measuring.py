"""What a job's devices measure before it is planned: seconds at its real shape, and how int8 layers multiply faster."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from coordinator.fleet.cores import shared_cores
from coordinator.fleet.membership import Device
from coordinator.jobs.profiler import Asked, Profiler, Seconds
from partitioner.block_seconds import mean_block
from partitioner.device import DeviceProfile, ProfileRequest
from partitioner.memory import MemoryModel
from partitioner.model import ModelTable
from partitioner.shape import JobShape
from plutino.errors import AgentError
from plutino.job.spec import JobSpec
from plutino.types import AgentId

_ROOMY = 2
"""Times what the job takes alone at the rows that are measured: the plan may choose more of them."""

LEAST_GAIN = 1.05
"""Integer products round every token's activations; they must raise the fleet's forward rate by this to be worth it."""

Measured = list[DeviceProfile | str]
"""Devices in their order, or why one could not be measured."""


async def measure_devices(
    devices: Sequence[Device],
    model: tuple[str, ModelTable],
    shape: JobShape,
    spec: JobSpec,
    profiler: Profiler,
    threads: int | None,
    *,
    known: Mapping[AgentId, DeviceProfile] | None = None,
) -> Measured:
    """All devices, measured at once but for those that share cores; not those whose seconds are ``known``."""
    found: dict[AgentId, DeviceProfile | str] = {}
    asked: list[Asked] = []
    _, table = model
    tight_hosts = _tight_hosts(devices, _whole_bytes(table, shape))
    for device in devices:
        used_threads = device.threads if threads is None else min(threads, device.threads)
        before = (known or {}).get(device.agent_id)
        if before is not None and before.threads == used_threads:
            found[device.agent_id] = device_profile(device, Seconds(before.timings, before.remark), used_threads)
        else:
            is_tight = device.host_id in tight_hosts
            asked.append(_asked(device, model, shape, spec, used_threads, is_tight=is_tight))
    for one, took in zip(asked, await profiler.measure(asked), strict=True):
        found[one.agent_id] = (
            str(took) if isinstance(took, AgentError) else device_profile(one.device, took, one.request.threads)
        )
    return [found[device.agent_id] for device in devices]


async def measure_products(
    devices: Sequence[Device],
    model: tuple[str, ModelTable],
    shape: JobShape,
    spec: JobSpec,
    profiler: Profiler,
    threads: int | None,
    *,
    integers: JobShape,
) -> tuple[JobShape, Measured, str]:
    """Devices measured with either of two shapes: the second differs in that its int8 layers multiply integers.

    Returns:
        The faster shape, the devices measured in it, and why it is the one.
    """
    dequantised = await measure_devices(devices, model, shape, spec, profiler, threads)
    integer = await measure_devices(devices, model, integers, spec, profiler, threads)
    is_faster, why = faster_products(model[1], dequantised, integer)
    return (integers, integer, why) if is_faster else (shape, dequantised, why)


def faster_products(table: ModelTable, dequantised: Measured, integer: Measured) -> tuple[bool, str]:
    """Whether int8 layers shall multiply integers on these devices, and why.

    Blocks are dealt out by speed, so that what counts is the sum of the devices' rates.
    """
    lost = [found for found, plain in zip(integer, dequantised, strict=True) if _is_lost(found, plain)]
    if lost:
        return False, f"integer products are left alone: {lost[0]}"
    rates = [
        sum(1 / mean_block(table, one.timings).forward_s for one in found if not isinstance(one, str))
        for found in (dequantised, integer)
    ]
    if not rates[0]:
        return False, "nothing was measured"
    gain = rates[1] / rates[0]
    figures = f"they run blocks at {gain:.2f} times the rate of dequantised weights on these devices"
    if gain >= LEAST_GAIN:
        return True, f"integer products, because {figures}"
    return False, f"no integer products: {figures}, and {LEAST_GAIN:g} is the least that counts"


def _is_lost(found: DeviceProfile | str, plain: DeviceProfile | str) -> bool:
    return isinstance(found, str) and not isinstance(plain, str)


def with_shared_cores(devices: Sequence[Device], profiles: Sequence[DeviceProfile]) -> tuple[DeviceProfile, ...]:
    """The profiles, each knowing with whom it shares its cores."""
    threads = {AgentId(profile.agent_id): profile.threads for profile in profiles}
    cores = shared_cores([device for device in devices if device.agent_id in threads], threads)
    return tuple(p.model_copy(update={"cores_id": cores[AgentId(p.agent_id)]}) for p in profiles)


def _tight_hosts(devices: Sequence[Device], whole_bytes: int) -> set[str]:
    """Hosts with a device that may have no room for a kept heap; those that measure together measure alike."""
    return {
        device.host_id
        for device in devices
        if device.memory_budget_bytes - device.baseline_bytes < _ROOMY * whole_bytes
    }


def _asked(
    device: Device, model: tuple[str, ModelTable], shape: JobShape, spec: JobSpec, threads: int, *, is_tight: bool
) -> Asked:
    config_json, _ = model
    request = ProfileRequest(
        config_json=config_json,
        dtype=shape.dtype,
        packing=shape.packing,
        micro_batch_rows=shape.micro_batch_rows,
        row_tokens=shape.row_tokens,
        source_tokens=shape.source_tokens,
        label_tokens=shape.label_tokens,
        method=spec.method.for_profile(),
        threads=threads,
        # Of a running job as well, whose rows are fixed: the same question finds what its device has kept.
        scales=spec.training.micro_batch_size is None,
        is_tight=is_tight,
        # A side network is never recomputed, and the blocks beside it keep nothing.
        recomputes=shape.checkpointing != "off" and not shape.side_reduction,
    )
    return Asked(device, request)


def _whole_bytes(table: ModelTable, shape: JobShape) -> int:
    """What one worker would hold that had the job alone and kept its heap."""
    items = MemoryModel(table, shape).items(
        0, table.num_blocks, num_stages=1, stage_index=0, checkpointing=False, keeps_heap=True
    )
    return sum(item.bytes for item in items)


def device_profile(device: Device, seconds: Seconds, threads: int) -> DeviceProfile:
    """A device as the planner sees it."""
    return DeviceProfile(
        agent_id=device.agent_id,
        name=device.name,
        host_id=device.host_id,
        threads=threads,
        available_bytes=device.memory_budget_bytes,
        baseline_bytes=device.baseline_bytes,
        timings=seconds.timings,
        remark=seconds.remark,
        dtypes=device.dtypes,
        slow_dtypes=tuple(sorted(device.slow_dtypes.items())),
        is_card=device.hardware.kind == "cuda",
    )
