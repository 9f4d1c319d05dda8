"""A real agent's worker becomes ten times slower while it runs: the job moves, and gets its speed and its bits back."""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from benchmarks.job_watch import JobWatch
from benchmarks.model_folder import job_values, write_base
from benchmarks.peers.workload import Workload
from benchmarks.processor_quota import ProcessorQuota, quota_refusal
from benchmarks.stack import PlutinoStack
from partitioner.plan import Plan
from plutino.events import JobEvent, PlanChanges, PlanMade, StepCommitted
from plutino.job.spec import parse_spec
from plutino.sizes import GIB

WORKLOAD = Workload(
    num_blocks=8,
    hidden_dim=256,
    intermediate_dim=704,
    num_heads=4,
    vocab_size=2048,
    seq_len_tokens=64,
    batch_size=8,
    num_micro_batches=4,
)
STEPS = 45
SLOW_FROM = 14
"""By then the job's usual pace is known."""
QUOTA = 0.4
"""Processors of each agent: two stages, the idle agent and the coordinator fit two cores together."""
WEIGHT = 64
WAIT_S = 180.0
LEAST_RECOVERED = 0.8
NAMES = ("a", "b", "c")


@contextlib.contextmanager
def fleet(tmp_path: Path) -> Iterator[tuple[PlutinoStack, dict[str, ProcessorQuota]]]:
    """A coordinator and three equal agents whose seconds follow from their quotas, whatever else runs here."""
    with ExitStack() as ending:
        quotas = {name: ending.enter_context(ProcessorQuota(QUOTA, weight=WEIGHT)) for name in NAMES}
        stack = ending.enter_context(PlutinoStack(tmp_path / "state"))
        stack.start_agents(dict.fromkeys(NAMES, 2 * GIB), quotas=quotas)
        yield stack, quotas


def run_job(
    stack: PlutinoStack, tmp_path: Path, name: str, replan: str, on_step: Callable[[StepCommitted, Plan], None]
) -> tuple[list[JobEvent], bytes]:
    """Train to the end; gives all events and the adapter."""
    folder = tmp_path / name
    written = write_base(WORKLOAD, folder, num_steps=STEPS, dtype="fp32")
    values = job_values(WORKLOAD, written, dtype="fp32", shadow_every=1_000_000, num_stages=2)
    values["placement"] = {"devices": list(NAMES), "stages": 2, "replicas": "never", "threads": 1, "replan": replan}
    values["output"] = {"dir": str(folder / "adapter")}
    watch = JobWatch(stack.client, stack.client.submit(parse_spec(values, base_dir=folder)))
    seen: list[JobEvent] = []
    plan: Plan | None = None
    while (event := watch.next(WAIT_S)) is not None:
        seen.append(event)
        if isinstance(event, PlanMade):
            plan = Plan.model_validate_json(event.plan_json)
        elif isinstance(event, StepCommitted):
            assert plan is not None
            on_step(event, plan)
    watch.join()
    return seen, (folder / "adapter" / "adapter_model.safetensors").read_bytes()


def of_kind(kind: type, events: list[JobEvent]) -> list:
    return [event for event in events if isinstance(event, kind)]


@pytest.mark.slow
@pytest.mark.chaos
@pytest.mark.timeout(900)
@pytest.mark.skipif(quota_refusal() is not None, reason="no quota of processor time can be set here")
def test_worker_that_is_throttled_tenfold_loses_its_blocks_and_the_job_its_delay_but_no_bit(tmp_path: Path) -> None:
    (tmp_path / "state").mkdir()
    with fleet(tmp_path) as (stack, quotas):
        undisturbed, adapter = run_job(stack, tmp_path, "calm", "never", lambda step, plan: None)
        slowed: list[str] = []

        def disturb(step: StepCommitted, plan: Plan) -> None:
            if step.step == SLOW_FROM and not slowed:
                slowed.append(plan.stages[1].device_names[0])
                quotas[slowed[0]].set(QUOTA / 10)

        events, moved_adapter = run_job(stack, tmp_path, "slowed", "auto", disturb)

    before, after = (Plan.model_validate_json(event.plan_json) for event in of_kind(PlanMade, events))
    (move,) = of_kind(PlanChanges, events)
    assert slowed[0] in before.stages[1].device_names
    assert slowed[0] not in [name for stage in after.stages for name in stage.device_names]
    assert slowed[0] in move.reason and SLOW_FROM < move.step < STEPS

    steps = of_kind(StepCommitted, events)
    assert [step.loss for step in steps] == [step.loss for step in of_kind(StepCommitted, undisturbed)]
    assert moved_adapter == adapter

    # The three are equal, so the new optimum is what the job had before.
    optimum_s = statistics.median(step.seconds for step in steps if 3 <= step.step <= SLOW_FROM)
    # The first step of a plan holds the move, and the second warms up.
    recovered_s = statistics.median(step.seconds for step in steps if step.step >= move.step + 2)
    slow_s = statistics.median(step.seconds for step in steps if SLOW_FROM + 2 <= step.step < move.step)
    print(f"seconds a step: {optimum_s:.3f} before, {slow_s:.3f} throttled, {recovered_s:.3f} after the move")
    assert optimum_s / recovered_s >= LEAST_RECOVERED
