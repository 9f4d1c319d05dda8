"""Jobs on agents that are processes with processors of their own: what was predicted, and what was measured.

Jobs are planned, trained and watched as anybody's. Entry points: :func:`measure` runs one, :func:`measure_all` several
under one coordinator until its time is up, :func:`scaling_table` shows them.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks.contender import START_TIMEOUT_S, STEP_TIMEOUT_S, ContenderError
from benchmarks.cores import apart, one_after_other, pinned
from benchmarks.job_watch import JobWatch
from benchmarks.model_folder import job_values, write_drawn_base
from benchmarks.peers.workload import Workload
from benchmarks.processor_quota import FIRST_WEIGHT, SPARE_PROCESSORS, ProcessorQuota
from benchmarks.run_figures import Figures, Run, figures_of, scaling_table
from benchmarks.stack import PlutinoStack
from partitioner.explain import explain
from partitioner.plan import Plan
from plutino.errors import PlutinoError
from plutino.events import PlanMade, StepCommitted
from plutino.job.spec import parse_spec
from plutino.sizes import GIB

NO_SHADOWS = 1_000_000
LEAST_STEPS = 4
"""One warms up, and even and odd ones are compared."""
TINY = Workload(
    num_blocks=4,
    hidden_dim=64,
    intermediate_dim=128,
    num_heads=4,
    vocab_size=512,
    seq_len_tokens=32,
    batch_size=8,
    num_micro_batches=8,
)
"""To see a benchmark run; quote nothing of it."""
_NUM_SPARE_STEPS = 4
"""Steps beyond those that are looked at: the job is cancelled before it would export what nobody wants."""
_BUDGET_BYTES = 3 * GIB


def agent_name(run: Run, index: int) -> str:
    """An agent's name; each run has its own agents."""
    return f"{run.label}-{index}"


def measure_all(
    runs: Sequence[Run], cores: Sequence[int], *, num_steps: int, minutes: float, on_figures: Callable[[Figures], None]
) -> dict[str, str]:
    """Measure one run after the other under one coordinator.

    Args:
        runs: in this order.
        cores: for all of it; with 9 or more the coordinator and this program get two that no agent has.
        num_steps: of each run.
        minutes: after which nothing is begun or waited for.
        on_figures: takes every run's figures as they come.

    Returns:
        Runs that gave no figures, and why.

    Raises:
        PlutinoError: the coordinator does not start.
    """
    deadline_s = time.monotonic() + 60 * minutes
    own, for_agents = apart(cores)
    failed: dict[str, str] = {}
    with pinned(own), tempfile.TemporaryDirectory(prefix="plutino-runs-") as scratch:
        state_dir = Path(scratch) / "state"
        state_dir.mkdir()
        with PlutinoStack(state_dir) as stack:
            for run in runs:
                if time.monotonic() > deadline_s:
                    failed[run.label] = f"not begun: the {minutes:g} minutes were over"
                    continue
                try:
                    figures = measure(run, stack, Path(scratch), for_agents, num_steps=num_steps, deadline_s=deadline_s)
                except (ContenderError, PlutinoError, OSError) as error:
                    # One run's failure is no reason to lose the others' figures.
                    failed[run.label] = f"{type(error).__name__}: {error}"
                    print(f"{run.name} failed: {error}", file=sys.stderr, flush=True)
                    continue
                print(scaling_table([figures]), flush=True)
                on_figures(figures)
    return failed


def measure(
    run: Run, stack: PlutinoStack, scratch: Path, cores: Sequence[int], *, num_steps: int, deadline_s: float
) -> Figures:
    """Start the run's agents, train, end them.

    Args:
        run: what to run.
        stack: the coordinator.
        scratch: a folder for the model and the rows.
        cores: processors that the agents get, each its own while there are enough.
        num_steps: to look at; the first one warms up.
        deadline_s: of the monotonic clock: nothing is waited for beyond it.

    Raises:
        ContenderError: the job failed, stopped telling, or was not through by the deadline.
        PlutinoError: a process does not start, or the job does not fit.
        OSError: a quota was asked for and cannot be set here.
    """
    threads = {agent_name(run, index): count for index, count in enumerate(run.threads)}
    if len(run.quotas) == len(threads):
        # Nobody's quota is another's, wherever both compute.
        pins = {name: set(cores) for name in threads}
        shares_cores = sum(run.quotas) > len(cores) - SPARE_PROCESSORS
    else:
        pins, shares_cores = one_after_other(threads, cores)
    folder = scratch / run.label
    written = write_drawn_base(run.workload, folder, num_steps=num_steps + _NUM_SPARE_STEPS)
    values = job_values(
        run.workload, written, dtype=run.dtype, checkpointing=run.checkpointing, shadow_every=NO_SHADOWS, num_stages=1
    )
    budgets = run.budgets_bytes or (_BUDGET_BYTES,) * len(threads)
    if run.job_share is not None:
        budgets = (_budget_for(run.job_share, stack, values, folder, sorted(cores)[:1]),) * len(threads)
    with ExitStack() as ending:
        quotas = {
            name: ending.enter_context(ProcessorQuota(allowed, weight=FIRST_WEIGHT, period_us=run.quota_period_us))
            for name, allowed in zip(threads, run.quotas, strict=False)
        }
        ending.callback(stack.stop_agents)
        stack.start_agents(
            dict(zip(threads, budgets, strict=True)),
            threads=threads,
            cores=pins,
            quotas=quotas,
            within_s=_left(deadline_s),
        )
        values["placement"] = {"devices": list(threads), "stages": run.num_stages, "replan": "never"}
        try:
            job_id = stack.client.submit(parse_spec(values, base_dir=folder))
            watch = JobWatch(stack.client, job_id)
            plan, steps = collect(watch, num_steps, deadline_s=deadline_s)
            stack.client.cancel(job_id)
            watch.join()
        except ContenderError as error:
            raise ContenderError(f"{run.name}: {error}\n{stack.logs()}") from error
    return figures_of(run, plan, steps, shares_cores=shares_cores)


def _budget_for(share: float, stack: PlutinoStack, values: dict[str, Any], folder: Path, cores: Collection[int]) -> int:
    """A worker's bytes before any job, and a share of what the job takes of one that has it alone."""
    name = f"whole-{folder.name}"
    try:
        stack.start_agents({name: _BUDGET_BYTES}, cores={name: cores})
        alone = {**values, "placement": {"devices": [name], "stages": 1}}
        (stage,) = stack.plan(parse_spec(alone, base_dir=folder)).stages
    finally:
        stack.stop_agents()
    return stage.baseline_bytes + int(share * stage.job_bytes)


def _left(deadline_s: float) -> float:
    return max(0.1, deadline_s - time.monotonic())


def collect(watch: JobWatch, num_steps: int, *, deadline_s: float) -> tuple[Plan, list[StepCommitted]]:
    """The plan and so many steps, the first of which warms up.

    Raises:
        ContenderError: the job failed, ended before, or was not through by ``deadline_s`` of the monotonic clock.
    """
    plan: Plan | None = None
    steps: list[StepCommitted] = []
    while len(steps) < num_steps:
        event = watch.next(min(STEP_TIMEOUT_S if steps else START_TIMEOUT_S, _left(deadline_s)))
        if event is None:
            raise ContenderError(f"the job ended after {len(steps)} of {num_steps} steps")
        if isinstance(event, PlanMade):
            plan = Plan.model_validate_json(event.plan_json)
            print(explain(plan), file=sys.stderr, flush=True)
        elif isinstance(event, StepCommitted):
            steps.append(event)
            print(f"step {event.step}: {event.seconds:.3f} s, loss {event.loss:.4f}", file=sys.stderr, flush=True)
    if plan is None:
        raise ContenderError("the job trained without telling its plan")
    return plan, steps
