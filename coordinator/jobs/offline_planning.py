"""Planning without a coordinator: a job file and a fleet file in, the problem that a coordinator would pose out."""

from __future__ import annotations

from pathlib import Path

import yaml
from pydantic import ValidationError

from coordinator.jobs.frozen_weights import dtype_for, packing_for
from coordinator.jobs.job_shape import measured_rows, shape_for
from coordinator.jobs.method_choice import (
    PlannedOption,
    candidates,
    choose,
    has_later_epochs,
    is_open,
    priced,
    refused,
    settled,
)
from coordinator.jobs.planning import allows_replicas, open_codecs, read_model
from coordinator.jobs.prepared import PreparedData
from coordinator.jobs.runner import JobRunner
from coordinator.scheduling.problem import PlanningProblem
from partitioner.dtype_choice import ComputeDtype
from partitioner.fleet_file import FleetFile
from partitioner.plan import Plan
from partitioner.shape import JobShape
from plutino.errors import ConfigError, ModelError, PlanError
from plutino.job.spec import JobSpec
from plutino.yaml_text import read_yaml


def load_fleet(path: Path) -> FleetFile:
    """A fleet file, YAML or JSON.

    Raises:
        ConfigError: it cannot be read, or a value in it is not one.
    """
    try:
        values = read_yaml(path.read_text())
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not YAML: {error}") from error
    try:
        return FleetFile.model_validate(values)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        raise ConfigError(f"{path}: {where}: {first['msg']}") from error


def offline_plan(spec: JobSpec, fleet: FleetFile) -> tuple[PlanningProblem, Plan | str]:
    """The job's plan on a fleet that is only described, or why there is none, and what decides it.

    Raises:
        ConfigError: a device offers less than a worker's baseline, or settings contradict each other.
        InfeasiblePlanError: the job leaves its method open, and no method fits.
        ModelError, DataError: the base model or the rows cannot be used.
    """
    prepared = JobRunner(spec, bulk_address="").prepare()
    if not is_open(spec):
        problem = offline_problem(spec, fleet, prepared)
        return problem, problem.plan_or_refusal()
    planned: list[PlannedOption] = []
    for option in candidates(spec, has_later_epochs=has_later_epochs(spec, prepared.num_train, prepared.total_steps)):
        if option.spec is None:
            planned.append(refused(option, option.why_not))
            continue
        try:
            problem = offline_problem(option.spec, fleet, prepared)
            planned.append(priced(option, problem, problem.plan(), prepared.total_steps))
        except (ConfigError, ModelError, PlanError) as error:
            planned.append(refused(option, error))
    _, problem, plan = settled(*choose(planned, prepared.total_steps))
    return problem, plan


def offline_problem(spec: JobSpec, fleet: FleetFile, prepared: PreparedData | None = None) -> PlanningProblem:
    """What decides the job's plan on a fleet that is only described.

    Args:
        spec: the job, with a method.
        fleet: the devices.
        prepared: the job's rows; None: they are read.

    Raises:
        ConfigError: a device offers less than a worker's baseline, or settings contradict each other.
        ModelError, DataError: the base model or the rows cannot be used.
    """
    prepared = prepared or JobRunner(spec, bulk_address="").prepare()
    _, table = read_model(spec)
    is_micro_batch_free = spec.training.micro_batch_size is None

    def shape_in(dtype: ComputeDtype) -> JobShape:
        return shape_for(spec, prepared, table, dtype, measured_rows(spec, None))

    # Seconds that a fleet file gives are those of every dtype.
    offered, wanted = fleet.profiles(table, shape_in("fp32")), spec.placement.devices
    devices = tuple(device for device in offered if not wanted or device.name in wanted)
    if not devices:
        names = ", ".join(device.name for device in offered[:20])
        raise ConfigError(f"placement.devices names none of the fleet's devices, which are {names}")
    dtype, dtype_why = dtype_for(spec, table, shape_in, devices, is_micro_batch_free=is_micro_batch_free)
    shape = shape_in(dtype)
    packing, why = packing_for(spec, table, shape, devices, None, is_micro_batch_free=is_micro_batch_free)
    shape = shape.model_copy(update={"packing": packing})
    return PlanningProblem(
        job_id="plan",
        table=table,
        shape=shape,
        is_micro_batch_free=is_micro_batch_free,
        packing_why=why,
        dtype_why=dtype_why,
        label_tokens_per_row=prepared.label_tokens_per_row,
        devices=devices,
        links=fleet.link_table(),
        codecs=open_codecs(spec, shape, None),
        num_train_rows=prepared.num_train,
        allow_replicas=allows_replicas(spec),
    )
