"""A plan's figures for people and programs: how long, how full, how much over which link, and how sure that is.

Entry points: :func:`report` and :func:`report_text`. The range of a step comes from the simulator: passes and messages
that stray by a tenth and a fifth, and one network card for all neighbours of a worker.
"""

from __future__ import annotations

from collections.abc import Sequence

from partitioner.device import DeviceProfile, LinkTable
from partitioner.micro_batch import scaled_devices, with_rows
from partitioner.model import ModelTable
from partitioner.plan import LinkUse, Plan
from partitioner.pricing import Candidate, Pricer
from partitioner.shape import JobShape
from partitioner.simulate import Noise, simulate_step
from partitioner.trace import Trace
from partitioner.values import PlanValue
from plutino.errors import PlanError
from plutino.sizes import MIB, format_size

_NOISE = Noise(compute_sigma=0.1, link_sigma=0.2, is_card_shared=True)
_NUM_PLAYED = 20


class DeviceUse(PlanValue):
    """How full a device gets."""

    device: str
    stage: int
    peak_bytes: int
    budget_bytes: int

    @property
    def margin_bytes(self) -> int:
        """What is left at the predicted peak."""
        return self.budget_bytes - self.peak_bytes


class PlanReport(PlanValue):
    """The figures beside a plan."""

    step_s: float
    step_range_s: tuple[float, float]
    """Shortest and longest of 20 simulated steps with jitter."""
    steps_per_epoch: int
    epoch_s: float
    epoch_range_s: tuple[float, float]
    cached_step_s: float | None = None
    """A step of later epochs, from the activation cache; None: they run as the first."""
    cached_epoch_s: float | None = None
    upper_blocks: tuple[int, int] | None = None
    """The blocks [from, to) that later epochs run; None: all, or with a side network none."""
    entry_bytes: int | None = None
    """Of what frozen blocks give of all rows, at most, on the disks of the devices that read it."""
    mean_step_s: float
    """Over all steps of the job: what plans were compared by."""
    devices: tuple[DeviceUse, ...]
    links: tuple[LinkUse, ...]


def replayed(
    plan: Plan, table: ModelTable, shape: JobShape, devices: Sequence[DeviceProfile], links: LinkTable
) -> Candidate:
    """A plan with the seconds of all its workers and links.

    Args:
        plan: the plan.
        table: the model.
        shape: the job at the micro-batch that the devices were measured with.
        devices: the devices it was made for.
        links: their links.

    Raises:
        PlanError: the plan is not one for these devices.
    """
    changes = {
        "codec": plan.codec,
        "bf16_borders": () if plan.codec == "bf16" else plan.bf16_borders,
        "runs_ahead": plan.runs_ahead,
        "frozen_share": 1.0,
    }
    used = with_rows(shape, plan.micro_batch_rows).model_copy(update=changes)
    pricer = Pricer(table, used, scaled_devices(devices, shape.micro_batch_rows, plan.micro_batch_rows), links)
    position = {device.agent_id: i for i, device in enumerate(devices)}
    lost = [agent_id for agent_id in plan.agent_ids if agent_id not in position]
    if lost:
        raise PlanError(f"the plan uses {lost[0]}, which is not among the devices; plan again")
    layout = tuple(tuple(position[agent_id] for agent_id in stage.agent_ids) for stage in plan.stages)
    cuts = (0, *(stage.end_block for stage in plan.stages))
    modes = tuple(stage.checkpointing for stage in plan.stages)
    return pricer.fixed(layout, cuts, modes)


def play(plan: Plan, candidate: Candidate) -> Trace:
    """One step of the plan as predicted."""
    return simulate_step(candidate.groups, plan.num_micro_batches)


def report(
    plan: Plan, candidate: Candidate, *, num_rows: int, batch_rows: int, cached_steps_share: float = 0.0
) -> PlanReport:
    """The figures of a plan.

    Args:
        plan: the plan.
        candidate: see :func:`replayed`.
        num_rows: rows of an epoch.
        batch_rows: rows of a step.
        cached_steps_share: steps from the activation cache for each one through the blocks.
    """
    played = [
        simulate_step(candidate.groups, plan.num_micro_batches, noise=_NOISE, seed=seed).step_s
        for seed in range(_NUM_PLAYED)
    ]
    low_s, high_s = min(*played, plan.step_s), max(*played, plan.step_s)
    steps, later_s = -(-num_rows // batch_rows), plan.later_step_s
    return PlanReport(
        step_s=plan.step_s,
        step_range_s=(low_s, high_s),
        steps_per_epoch=steps,
        epoch_s=steps * plan.step_s,
        epoch_range_s=(steps * low_s, steps * high_s),
        cached_step_s=later_s,
        cached_epoch_s=None if later_s is None else steps * later_s,
        upper_blocks=None if plan.upper is None else (plan.upper.place, plan.stages[-1].end_block),
        entry_bytes=None if plan.upper is None else num_rows * plan.upper.row_bytes,
        mean_step_s=plan.mean_step_s(cached_steps_share),
        devices=tuple(
            DeviceUse(
                device=replica.device_name,
                stage=stage.stage_index,
                peak_bytes=replica.peak_bytes,
                budget_bytes=replica.budget_bytes,
            )
            for stage in plan.stages
            for replica in stage.replicas
        ),
        links=plan.links,
    )


def report_text(figures: PlanReport) -> str:
    """The figures as lines for a person."""
    low_s, high_s = figures.step_range_s
    epoch_low_s, epoch_high_s = figures.epoch_range_s
    lines = [
        f"a step takes {figures.step_s:.3g} s ({low_s:.3g} to {high_s:.3g} s with jitter), an epoch of "
        f"{figures.steps_per_epoch} steps {_duration(figures.epoch_s)} ({_duration(epoch_low_s)} to "
        f"{_duration(epoch_high_s)})",
    ]
    if figures.cached_step_s is not None and figures.cached_epoch_s is not None:
        what = "without the blocks"
        if figures.upper_blocks is not None and figures.entry_bytes is not None:
            first, end = figures.upper_blocks
            what = f"which runs blocks {first} to {end - 1} alone and keeps at most {format_size(figures.entry_bytes)}"
        lines.append(
            f"later epochs come from the activation cache, {what}: a step {figures.cached_step_s:.3g} s, "
            f"an epoch {_duration(figures.cached_epoch_s)}; {figures.mean_step_s:.3g} s a step over the whole job"
        )
    lines.append("memory left at the peak:")
    for use in figures.devices:
        share = use.margin_bytes / use.budget_bytes
        lines.append(
            f"  {use.device}: {use.margin_bytes / MIB:.0f} MiB of {use.budget_bytes / MIB:.0f} MiB ({share:.0%})"
        )
    lines.append("links, per step:" if figures.links else "links: none, one device does it all")
    lines += [_link_line(link) for link in figures.links]
    return "\n".join(lines) + "\n"


def _link_line(link: LinkUse) -> str:
    amounts = f"{link.down_bytes / MIB:.2f} MiB down, {link.up_bytes / MIB:.2f} MiB up"
    what = "" if link.carries == "hidden states" else f" of {link.carries}"
    busy = f"busy {link.busy_s:.3g} s {'each way' if link.up_bytes else 'down'}"
    return f"  {link.from_device} to {link.to_device}: {amounts}{what}, {busy} ({format_rate(link)})"


def format_rate(link: LinkUse) -> str:
    """A link's figures and where they come from: 941 Mbit/s, 0.31 ms, measured 12 s ago."""
    parts = [f"{link.bandwidth_bytes_per_s * 8 / 1e6:.0f} Mbit/s", f"{link.latency_s * 1e3:.2f} ms", link.how_known]
    return ", ".join(part for part in parts if part)


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"
