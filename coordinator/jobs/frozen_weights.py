"""How a job's frozen weights will be held and multiplied: what must be known before its devices measure themselves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal

from partitioner.device import DeviceProfile, LinkTable
from partitioner.dtype_choice import ComputeDtype, choose_dtype
from partitioner.fitting import fits, fits_with_any_rows
from partitioner.model import ModelTable
from partitioner.packed import check_scheme
from partitioner.scheme_choice import choose_scheme
from partitioner.shape import JobShape
from plutino.errors import ConfigError
from plutino.job.model import Packing, Scheme, packing_of
from plutino.job.numerics import NumericsRecord
from plutino.job.spec import JobSpec


def dtype_for(
    spec: JobSpec,
    table: ModelTable,
    shape_in: Callable[[ComputeDtype], JobShape],
    devices: Sequence[DeviceProfile],
    *,
    is_micro_batch_free: bool,
) -> tuple[ComputeDtype, str]:
    """The compute dtype of a job's first plan, and why where that needs a word; see :func:`choose_dtype`.

    Args:
        spec: the job.
        table: the model.
        shape_in: the job's shape in a dtype.
        devices: devices that may be used; of their timings nothing is used.
        is_micro_batch_free: the planner chooses the micro-batch.
    """
    if spec.model.dtype != "auto":
        return "fp32" if spec.model.dtype == "fp32" else "bf16", ""

    def fits_packed(scheme: Scheme | Literal["auto"], dtype: ComputeDtype) -> bool:
        model = spec.model.model_copy(update={"quantization": scheme})
        asked, shape = spec.model_copy(update={"model": model}), shape_in(dtype)
        packing, _ = packing_for(asked, table, shape, devices, None, is_micro_batch_free=is_micro_batch_free)
        fits_so = fits_with_any_rows if is_micro_batch_free else fits
        return fits_so(table, shape.model_copy(update={"packing": packing}), devices)

    # bf16 loses less than any scheme.
    wanted = spec.model.quantization
    for scheme in ("none", wanted) if wanted == "auto" else (wanted,):
        found = choose_dtype(devices, fits=partial(fits_packed, scheme), is_exact=spec.method.trains_weights)
        if found[0] == "bf16":
            return found
    return "fp32", ""


def packing_for(
    spec: JobSpec,
    table: ModelTable,
    shape: JobShape,
    devices: Sequence[DeviceProfile],
    numerics: NumericsRecord | None,
    *,
    is_micro_batch_free: bool,
) -> tuple[Packing, str]:
    """How the frozen weights will be held, and why; nothing is said of a job that wants none of it.

    Raises:
        ConfigError: the embedding or head is to be trained and packed.
        QuantizationError: the scheme cannot hold this model's layers.
    """
    for setting, packed, trained in (
        ("quantize_embedding", spec.model.quantize_embedding, shape.first_trainable_params),
        ("quantize_head", spec.model.quantize_head, shape.last_trainable_params),
    ):
        if packed != "keep" and trained and spec.method.trains_outer_modules:
            raise ConfigError(
                f"model.{setting}: {packed} packs what method.modules_to_save trains ({trained} parameters); "
                f"set model.{setting}: keep, or leave it out of modules_to_save"
            )
    if numerics is not None:
        return numerics.packing, "" if numerics.packing.is_plain else "fixed by the numerics record"
    wanted = spec.model.quantization
    if wanted != "auto":
        check_scheme(table, wanted)
        packing = packing_of(spec.model, wanted)
        return packing, "" if packing.is_plain else "as the job asks"
    scheme, why = choose_scheme(
        table,
        shape.model_copy(update={"packing": packing_of(spec.model, "none")}),
        devices,
        LinkTable(),
        is_micro_batch_free=is_micro_batch_free,
    )
    return packing_of(spec.model, scheme), why


def may_multiply_integers(specs: Sequence[JobSpec], packing: Packing) -> bool:
    """Whether these jobs' blocks may do without a gradient, and hold what integers are multiplied of."""
    return packing.scheme == "int8" and all(
        spec.method.leaves_blocks_alone
        and not spec.method.prunes_by_gradients
        and spec.model.integer_products == "auto"
        for spec in specs
    )
