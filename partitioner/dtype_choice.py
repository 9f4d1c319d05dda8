"""Which dtype computes a job's frozen layers where the job says ``auto``: bf16 where it is faster, or makes it fit.

Entry point: :func:`choose_dtype`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

from partitioner.device import DeviceProfile

ComputeDtype = Literal["fp32", "bf16"]


def choose_dtype(
    devices: Sequence[DeviceProfile], *, fits: Callable[[ComputeDtype], bool], is_exact: bool
) -> tuple[ComputeDtype, str]:
    """The dtype, and why it is not the usual one; empty if it is.

    Args:
        devices: devices that may be used, each with the dtypes that it offers, fastest first; their seconds are not.
        fits: whether the job fits them in a dtype.
        is_exact: the weights themselves are trained, which bf16 would round first.
    """
    if is_exact:
        return "fp32", ""
    if all(device.dtypes[:1] == ("bf16",) for device in devices):
        return "bf16", ""
    slower = [device.name for device in devices if device.dtypes[:1] != ("bf16",)]
    if any("bf16" in device.dtypes for device in devices) and not fits("fp32") and fits("bf16"):
        return "bf16", f"bf16, because the job does not fit in fp32; fp32 is faster on {', '.join(slower[:10])}"
    return "fp32", ""
