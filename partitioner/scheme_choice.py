"""Which scheme holds a job's frozen weights where the job says ``auto``: the least lossy that fits the devices.

Entry point: :func:`choose_scheme`.
"""

from __future__ import annotations

from collections.abc import Sequence

from partitioner.device import DeviceProfile, LinkTable
from partitioner.fitting import fits, fits_with_any_rows
from partitioner.model import ModelTable
from partitioner.packed import check_scheme
from partitioner.shape import JobShape
from plutino.errors import QuantizationError
from plutino.job.model import Scheme

LEAST_LOSSY_FIRST: tuple[Scheme, ...] = ("none", "int8", "nf4", "int4")
"""By the error of the weights: 0, 0.0083, 0.092 and 0.097 of their norm, measured on a normally distributed 2048 x 2048
matrix (torch 2.13); benchmarks/quantize.py tells it beside other libraries'."""


def choose_scheme(
    table: ModelTable,
    shape: JobShape,
    devices: Sequence[DeviceProfile],
    links: LinkTable,
    *,
    is_micro_batch_free: bool,
) -> tuple[Scheme, str]:
    """The scheme, and why. Where none fits it is the smallest, for whose bill the refusal will then give numbers.

    Args:
        table: the model.
        shape: the job; its packing's scheme is the one that is replaced.
        devices: devices that may be used; of their timings nothing is used.
        links: links between them.
        is_micro_batch_free: the planner chooses the micro-batch.
    """
    if table.gptq is not None:
        return "gptq", "the checkpoint is a GPTQ one"
    fits_so = fits_with_any_rows if is_micro_batch_free else fits
    lost: list[str] = []
    smallest_scheme: Scheme = "none"
    for scheme in LEAST_LOSSY_FIRST:
        try:
            check_scheme(table, scheme)
        except QuantizationError as error:
            lost.append(f"{scheme} cannot hold this model ({error})")
            continue
        smallest_scheme = scheme if scheme != "int4" else smallest_scheme
        packing = shape.packing.model_copy(update={"scheme": scheme})
        if fits_so(table, shape.model_copy(update={"packing": packing}), devices, links):
            return scheme, f"the least lossy that fits: {'; '.join(lost)}" if lost else "it fits without any"
        lost.append(f"{scheme} does not fit the devices")
    return smallest_scheme, f"nothing fits: {'; '.join(lost)}"
