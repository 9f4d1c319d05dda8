"""Planning without a coordinator: a job file and a fleet file in, the problem that a coordinator would pose out."""

from __future__ import annotations

from pathlib import Path

import yaml
from pydantic import ValidationError

from coordinator.jobs.job_shape import measured_rows, shape_for
from coordinator.jobs.planning import allows_replicas, open_codecs, packing_for, read_model
from coordinator.jobs.runner import JobRunner
from coordinator.scheduling.problem import PlanningProblem
from partitioner.fleet_file import FleetFile
from plutino.errors import ConfigError
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


def offline_problem(spec: JobSpec, fleet: FleetFile) -> PlanningProblem:
    """What decides the job's plan on a fleet that is only described.

    Raises:
        ConfigError: a device offers less than a worker's baseline, or settings contradict each other.
        ModelError, DataError: the base model or the rows cannot be used.
    """
    prepared = JobRunner(spec, bulk_address="").prepare()
    _, table = read_model(spec)
    is_bf16 = all(device.dtypes[0] == "bf16" for device in fleet.devices)
    dtype = spec.model.dtype if spec.model.dtype != "auto" else ("bf16" if is_bf16 else "fp32")
    shape = shape_for(spec, prepared, table, dtype, measured_rows(spec, None))
    is_micro_batch_free = spec.training.micro_batch_size is None
    offered, wanted = fleet.profiles(table, shape), spec.placement.devices
    devices = tuple(device for device in offered if not wanted or device.name in wanted)
    if not devices:
        names = ", ".join(device.name for device in offered[:20])
        raise ConfigError(f"placement.devices names none of the fleet's devices, which are {names}")
    packing, why = packing_for(spec, table, shape, devices, None, is_micro_batch_free=is_micro_batch_free)
    shape = shape.model_copy(update={"packing": packing})
    return PlanningProblem(
        job_id="plan",
        table=table,
        shape=shape,
        is_micro_batch_free=is_micro_batch_free,
        packing_why=why,
        label_tokens_per_row=prepared.label_tokens_per_row,
        devices=devices,
        links=fleet.link_table(),
        codecs=open_codecs(spec, shape, None),
        num_train_rows=prepared.num_train,
        allow_replicas=allows_replicas(spec),
    )
