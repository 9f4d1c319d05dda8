"""Which shadows hold the whole state of a step."""

from __future__ import annotations

from collections.abc import Sequence

from coordinator.jobs.context import JobContext
from coordinator.jobs.recovery import Shadow, durable_steps
from plutino.errors import JobError
from plutino.job.assignment import RestorePoint


def restore_point(context: JobContext, restore_step: int) -> RestorePoint | None:
    """What a worker of a new plan starts from; None: fresh values."""
    if restore_step == 0:
        return None
    shadows = _durable(context, restore_step)
    return RestorePoint(
        step=restore_step,
        shadows={shadow.shadow_id: shadow.sha256 for shadow in shadows},
        sizes_bytes={shadow.shadow_id: shadow.bytes for shadow in shadows},
        is_left_on_devices=context.move_times is not None,
    )


def restorable(context: JobContext, step: int) -> dict[str, str]:
    """Shadow ids and hashes that hold the whole state of a step.

    Raises:
        JobError: the step is not durable.
    """
    return {shadow.shadow_id: shadow.sha256 for shadow in _durable(context, step)}


def _durable(context: JobContext, step: int) -> Sequence[Shadow]:
    names = frozenset(context.record.parameter_names)
    durable = durable_steps(context.store.shadows(context.job_id), names)
    if step not in durable:
        raise JobError(f"step {step} is no longer durable; durable are {sorted(durable) or 'none'}")
    return durable[step]
