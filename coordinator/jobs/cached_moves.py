"""Whether a job with an activation cache should take in a device that joined: pure.

Steps from the cache take another time than steps through the blocks, and what is cached says nothing about a device's
speed: here only joining counts. A plan that begins now runs through the blocks until it has run a whole epoch, which
places its entries; from then on its steps come from the cache again. The rest of the job is priced so, for the present
plan and for the new one, and weighed as every other move is (:mod:`coordinator.jobs.replanning`).
"""

from __future__ import annotations

from coordinator.jobs.phases import with_cached_step
from coordinator.jobs.replanning import Choice, step_s_of
from coordinator.scheduling.problem import PlanningProblem
from partitioner.plan import Plan
from plutino.data.batches import steps_per_epoch
from plutino.job.spec import JobSpec


def pipeline_steps(next_step: int, start_step: int, epoch_steps: int) -> int:
    """Steps from ``next_step`` on until a pipeline that began at ``start_step`` has run a whole epoch."""
    first_whole = -(-start_step // epoch_steps) * epoch_steps
    return max(0, first_whole + epoch_steps - next_step)


def mean_step_s(plan: Plan, step_s: float, num_steps: int, num_through_blocks: int) -> float:
    """Mean seconds of the next steps, of which the first go through the blocks in ``step_s`` each."""
    later_s = plan.later_step_s
    if later_s is None:
        return step_s
    through = min(num_steps, num_through_blocks)
    return (through * step_s + (num_steps - through) * later_s) / num_steps


def cached_choice(
    present: Plan,
    new: Plan,
    problem: PlanningProblem,
    spec: JobSpec,
    *,
    next_step: int,
    start_step: int,
    end_step: int,
    total_steps: int,
    move_s: float,
    now_s: float,
    last_move_s: float | None,
) -> Choice:
    """What is known when such a job could move.

    Args:
        present: the plan that runs, with or without the backbone.
        new: the best plan over the devices that are there now.
        problem: what ``new`` was planned from.
        spec: the job.
        next_step: the first step that is not decided.
        start_step: with which the present plan began.
        end_step: at which training ends.
        total_steps: of the job.
        move_s: seconds of one move.
        now_s: of the clock.
        last_move_s: of the last move; None: there was none.
    """
    left, epoch_steps = end_step - next_step, steps_per_epoch(problem.num_train_rows, spec.training.batch_size)
    new = with_cached_step(new, problem, spec, total_steps=total_steps)
    new_through = pipeline_steps(next_step, next_step, epoch_steps)
    if present.from_cache:
        now = present.step_s
    else:
        through = pipeline_steps(next_step, start_step, epoch_steps)
        now = mean_step_s(present, step_s_of(problem, present), left, through)
    # Without its backbone a job moves into a pipeline, and out of it again.
    leaves_again = new.cached is not None and left > new_through
    return Choice(
        now_s=now_s,
        last_move_s=last_move_s,
        steps_left=left,
        step_s=now,
        new_step_s=mean_step_s(new, new.step_s, left, new_through),
        move_s=move_s * (2 if leaves_again and present.from_cache else 1),
    )
