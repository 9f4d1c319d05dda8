"""From a job and the devices that are in to a planning problem: sizes from the model's files, measured seconds."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from functools import reduce

from coordinator.fleet.link_map import LinkMap
from coordinator.fleet.membership import Device
from coordinator.fleet.registry import FleetRegistry
from coordinator.jobs.eligibility import agreed_versions, eligible, shared_arithmetic
from coordinator.jobs.frozen_weights import dtype_for, may_multiply_integers, packing_for
from coordinator.jobs.job_shape import larger_shape, may_cut_by_tokens, measured_rows, shape_for
from coordinator.jobs.measuring import (
    device_profile,
    measure_devices,
    measure_products,
    with_shared_cores,
)
from coordinator.jobs.prepared import PreparedData
from coordinator.jobs.profiler import Profiler, Seconds
from coordinator.scheduling.problem import PlanningProblem
from partitioner.device import BlockTimings, DeviceProfile, LinkTable
from partitioner.fitting import fits, fits_with_any_rows
from partitioner.micro_batch import lightest_shapes
from partitioner.model import ModelTable, describe_model
from partitioner.plan import Plan, RejectedPlan
from partitioner.question import Codec
from partitioner.refusal import refuse
from partitioner.shape import JobShape
from plutino.errors import ConfigError, InfeasiblePlanError, ModelError, UnmeasuredError
from plutino.families import Family, family_of
from plutino.gptq_index import gptq_format, unpacked_shapes
from plutino.hub_id import index_folder, model_folder
from plutino.job.numerics import NumericsRecord
from plutino.job.spec import JobSpec
from plutino.random_weights import read_random_weights
from plutino.safetensors_index import read_safetensors_headers
from plutino.types import AgentId, JobId, MicroBatchCut, SumDtype


def read_model(spec: JobSpec) -> tuple[str, ModelTable]:
    """config.json and the sizes of the base model.

    Raises:
        ModelError: the folder is missing, of an unknown family, or has no safetensors.
    """
    model_dir = model_folder(spec.model.path)
    try:
        config_json = (model_dir / "config.json").read_text()
    except OSError as error:
        raise ModelError(f"cannot read {model_dir / 'config.json'}: {error.strerror}; is model.path right?") from error
    config = json.loads(config_json)
    family = family_of(config.get("model_type"))
    tensors = read_random_weights(model_dir) or read_safetensors_headers(index_folder(model_dir))
    shapes = {name: entry.shape for name, entry in tensors.items()}
    gptq = gptq_format(config)
    if gptq is not None:
        shapes = unpacked_shapes(shapes, gptq)
    return config_json, describe_model(config, shapes, family).model_copy(update={"gptq": gptq})


async def make_problem(
    job_id: JobId,
    spec: JobSpec,
    prepared: PreparedData,
    fleet: FleetRegistry,
    profiler: Profiler,
    *,
    numerics: NumericsRecord | None,
    excluded: dict[AgentId, str],
    is_started: bool,
    links: LinkMap | None = None,
    together_with: Sequence[JobSpec] = (),
    must_fit: bool = True,
    known: Mapping[AgentId, DeviceProfile] | None = None,
) -> PlanningProblem:
    """Gather everything that decides a job's plan.

    Args:
        job_id: the job.
        spec: what it asks.
        prepared: its rows.
        fleet: the devices.
        profiler: their measured seconds.
        numerics: what its first plan fixed; None before.
        excluded: devices that may not take part, with the reason.
        is_started: it has run already.
        links: the ways between devices; None assumes them.
        together_with: jobs that differ in their method alone; the plan will hold whichever of them needs most.
        must_fit: a job that cannot fit is refused before devices measure themselves.
        known: devices whose seconds at the numerics record's micro-batch an earlier plan knew.

    Raises:
        InfeasiblePlanError: no device may take part, or the job does not fit those that may.
        UnmeasuredError: none of those could be measured.
        ModelError: the base model cannot be used.
    """
    config_json, table = await asyncio.to_thread(read_model, spec)
    generated = prepared.prompt_tokens + spec.generated_tokens if spec.generated_rows else 0
    virtual_tokens = max(one.method.prompt_tokens + one.method.past_tokens for one in (spec, *together_with))
    longest = max(prepared.row_tokens, generated) + virtual_tokens
    if longest > table.max_positions:
        raise ConfigError(
            f"the longest row (or prompt with scoring.max_new_tokens) has {longest} tokens, the model has "
            f"{table.max_positions} positions; lower data.max_tokens or scoring.max_new_tokens"
        )
    found = eligible(fleet.devices, wanted_names=spec.placement.devices, numerics=numerics, excluded=excluded)
    devices = found.devices
    if not devices:
        why = found.reasons() or "no device has joined; make a token for each: plutino token create"
        raise InfeasiblePlanError(f"no device can take part: {why}")
    rows = measured_rows(spec, numerics)
    recorded = {} if numerics is None else {"codec": numerics.codecs, "bf16_borders": numerics.bf16_borders}
    is_micro_batch_free = numerics is None and spec.training.micro_batch_size is None
    offers = [_unmeasured(device) for device in devices]

    def shape_in(dtype: str) -> JobShape:
        shapes = [shape_for(one, prepared, table, dtype, rows) for one in (spec, *together_with)]
        return reduce(larger_shape, shapes)

    dtype, dtype_why = numerics.dtype if numerics is not None else "fp32", ""
    if numerics is None:
        dtype, dtype_why = await asyncio.to_thread(
            dtype_for, spec, table, shape_in, offers, is_micro_batch_free=is_micro_batch_free
        )
    shape = shape_in(dtype)
    packing, packing_why = packing_for(spec, table, shape, offers, numerics, is_micro_batch_free=is_micro_batch_free)
    is_on_cards = all(device.hardware.kind != "cpu" for device in devices)
    shape = shape.model_copy(update={"packing": packing, "is_on_cards": is_on_cards, **recorded})
    if must_fit and not is_started:
        # Known without a second of measuring, which an absurd job would keep devices busy with.
        await asyncio.to_thread(_refuse_what_cannot_fit, table, shape, devices, is_micro_batch_free)
    # Cards have the memory for it. Small devices hold blocks rather than more micro-batches.
    shape = shape.model_copy(update={"runs_ahead": is_on_cards})
    if links is not None:
        # Before the devices measure themselves, which bursts would disturb.
        await links.known_among(device.agent_id for device in devices)
    threads = spec.placement.threads if numerics is None else numerics.threads_per_worker
    of_job = (config_json, table), shape, spec, profiler, threads
    integers = shape.model_copy(update={"packing": packing.model_copy(update={"products": "integer"})})
    if (
        numerics is None
        and may_multiply_integers((spec, *together_with), packing)
        and _fits(table, integers, devices, is_micro_batch_free)
    ):
        shape, profiles, products_why = await measure_products(devices, *of_job, integers=integers)
        packing_why += f"; {products_why}"
    else:
        profiles = await measure_devices(devices, *of_job, known=known)
    measured = with_shared_cores(devices, [p for p in profiles if isinstance(p, DeviceProfile)])
    if not measured:
        raise UnmeasuredError("no device could be measured: " + "; ".join(str(p) for p in profiles))
    unmeasured = tuple(
        RejectedPlan(what=device.name, why=f"could not be measured: {profile}")
        for device, profile in zip(devices, profiles, strict=True)
        if isinstance(profile, str)
    )
    return PlanningProblem(
        job_id=job_id,
        table=table,
        shape=shape,
        is_micro_batch_free=is_micro_batch_free,
        packing_why=packing_why,
        dtype_why=dtype_why,
        label_tokens_per_row=prepared.label_tokens_per_row,
        devices=measured,
        links=LinkTable() if links is None else links.table(devices),
        left_out=(*found.left_out, *unmeasured),
        num_unmeasured=len(unmeasured),
        is_started=is_started,
        codecs=open_codecs(spec, shape, numerics),
        num_train_rows=prepared.num_train,
        allow_replicas=allows_replicas(spec),
    )


def open_codecs(spec: JobSpec, shape: JobShape, numerics: NumericsRecord | None) -> tuple[Codec, ...]:
    """Codecs that the first plan of a job may choose from; empty: only the one it names.

    Rounding hidden states to bf16 changes the job's bits, so the job must have left its numerics or its codec free.
    """
    placement = spec.placement
    if spec.objective.row_use == "source_target":
        return ()  # rounded in place would be one of the two streams only
    is_asked = placement.codec == "auto" or (placement.numerics == "free" and placement.codec == "raw")
    return ("raw", "bf16") if numerics is None and is_asked and shape.dtype == "fp32" else ()


def _refuse_what_cannot_fit(
    table: ModelTable, shape: JobShape, devices: Sequence[Device], is_micro_batch_free: bool
) -> None:
    if not _fits(table, shape, devices, is_micro_batch_free):
        shapes = lightest_shapes(table, shape) if is_micro_batch_free else (shape,)
        refuse(table, shapes, [_unmeasured(device) for device in devices], LinkTable())


def _fits(table: ModelTable, shape: JobShape, devices: Sequence[Device], is_micro_batch_free: bool) -> bool:
    fits_so = fits_with_any_rows if is_micro_batch_free else fits
    return fits_so(table, shape, [_unmeasured(device) for device in devices])


def make_numerics(
    plan: Plan,
    family: Family,
    devices: Sequence[Device],
    *,
    is_beside: bool = False,
    replicas_fold: bool = False,
    sums: SumDtype = "fp32",
    micro_batch_cut: MicroBatchCut = "rows",
) -> NumericsRecord:
    """The record that fixes the job's bits, from its first plan.

    Args:
        plan: the plan.
        family: of the model.
        devices: those of the fleet.
        is_beside: a side network runs beside the blocks; its state is not rounded in place, so that the codec is
            that of every boundary, wherever stages end.
        replicas_fold: the plan was made for replicas that hand over sums.
        sums: how sums of gradients travel.
        micro_batch_cut: what :func:`micro_batch_cut_of` says.
    """
    chosen = {device.agent_id: device for device in devices}
    members = [chosen[AgentId(agent_id)] for agent_id in plan.agent_ids]
    threads = {replica.threads for stage in plan.stages for replica in stage.replicas}
    return NumericsRecord(
        dtype="fp32" if plan.dtype == "fp32" else "bf16",
        packing=plan.packing,
        attention=family.attention,
        micro_batch_size=plan.micro_batch_rows,
        micro_batch_cut=micro_batch_cut,
        threads_per_worker=threads.pop() if len(threads) == 1 else None,
        codecs=plan.codec if is_beside else "raw",
        bf16_borders=() if is_beside else plan.bf16_borders,
        replicas_fold=replicas_fold,
        sums=sums,
        versions=agreed_versions(members),
        arithmetic=shared_arithmetic(members),
    )


def micro_batch_cut_of(plan: Plan, spec: JobSpec, earlier: NumericsRecord | None = None) -> MicroBatchCut:
    """What micro-batches have alike: as before, or in a job's first plan tokens where devices share the whole model.

    Free numerics keep it too: later epochs repeat micro-batches whose states are kept.
    """
    if earlier is not None:
        return earlier.micro_batch_cut
    is_data_parallel = len(plan.stages) == 1 and plan.has_replicas
    is_asked = spec.training.micro_batch_cut == "tokens"
    return "tokens" if is_asked or (is_data_parallel and may_cut_by_tokens(spec)) else "rows"


def allows_replicas(spec: JobSpec) -> bool:
    """Whether workers may share a stage: each must see all rows where its first values follow from them."""
    return spec.placement.replicas == "auto" and not spec.method.prunes_by_gradients


def _unmeasured(device: Device) -> DeviceProfile:
    """A device by its memory alone: how it is measured depends on the scheme."""
    any_s = BlockTimings(forward_s=1.0, backward_s=1.0, embedding_s=1.0, head_forward_s=1.0, head_backward_s=1.0)
    return device_profile(device, Seconds(any_s), device.threads)


async def profiles_of(
    devices: Sequence[Device], spec: JobSpec, shape: JobShape, profiler: Profiler, numerics: NumericsRecord
) -> list[DeviceProfile]:
    """Devices that joined a running job's fleet, measured; those that cannot be measured are left out."""
    if not devices:
        return []
    model = await asyncio.to_thread(read_model, spec)
    found = await measure_devices(devices, model, shape, spec, profiler, numerics.threads_per_worker)
    return list(with_shared_cores(devices, [p for p in found if isinstance(p, DeviceProfile)]))
