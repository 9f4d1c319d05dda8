"""Real workers killed while a job changes its phase, to the activation cache or back: no bit of its result moves."""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import psutil
import pytest

from benchmarks.job_watch import JobWatch
from plutino.assets import SNIPS_DIR, TINY_LLAMA_DIR
from plutino.events import JobEvent, Moved, PlanChanges, PlanMade, WorkerLost
from plutino.job.spec import load_spec
from tests.e2e.stack import Stack, write_job
from tests.integration.stack import losses

NAMES, CALM = ("one", "two"), "calm"
"""Devices whose workers are killed, and one that keeps no states: its job never leaves its blocks."""
NUM_ROWS = 12
NUM_ATTEMPTS = 3
"""A move takes some tenths of a second: it may be over before a signal arrives."""
LEAVES_AT, RETURNS_AT = 2, 6
WAIT_S = 240.0


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    stack = Stack(tmp_path_factory.mktemp("stack"))
    try:
        stack.up("--engine", "local")
        for name in (*NAMES, CALM):
            options = ["--activation-cache", "0"] if name == CALM else []
            stack.node(name, "900MiB", "--cache-dir", str(stack.folder / f"cache of {name}" / "weights"), *options)
        stack.await_devices(*NAMES, CALM)
        yield stack
    finally:
        stack.close()


def job_file(stack: Stack, name: str, first_row: int, devices: tuple[str, ...]) -> Path:
    """A job over rows of its own, none of whose states are in the cache yet; a stage a device."""
    rows = stack.folder / f"rows from {first_row}.jsonl"
    with (SNIPS_DIR / "train.jsonl").open(encoding="utf-8") as lines:
        rows.write_text("".join(islice(lines, first_row, first_row + NUM_ROWS)), encoding="utf-8")
    return write_job(
        stack.folder / f"{name}.yaml",
        TINY_LLAMA_DIR,
        data={"train": str(rows)},
        method={"type": "parallel_adapters", "reduction": 4},
        training={
            "epochs": 3,
            "batch_size": 6,
            "micro_batch_size": 2,
            "lr": 2e-3,
            "activation_cache": "raw",
        },
        placement={
            "devices": list(devices),
            "stages": len(devices),
            "replicas": "never",
            "cached_epochs": "data-parallel",
        },
        output={"dir": str(stack.folder / f"adapter of {name}")},
    )


def worker_of(stack: Stack, device: str) -> psutil.Process:
    """The device's worker with the job: its spare one was started later."""
    children = psutil.Process(stack.processes[device].pid).children(recursive=True)
    workers = [child for child in children if "--events-fd" in child.cmdline()]
    return min(workers, key=lambda worker: worker.create_time())


class Kill:
    """SIGKILL to a worker when a change of phase has come so far.

    Args:
        stack: whose agents run the job.
        step: steps done before the change.
        is_planned: the workers have given their stages back, and load what the next plan says; else they are about to.
        device: whose worker it is.
    """

    def __init__(self, stack: Stack, step: int, *, is_planned: bool, device: str) -> None:
        self._stack, self._step, self._is_planned, self._device = stack, step, is_planned, device
        self._plan_epoch: int | None = None
        self.is_done = False

    def look(self, event: JobEvent) -> None:
        if isinstance(event, PlanChanges) and event.step == self._step:
            self._plan_epoch = event.plan_epoch
        if self._plan_epoch is None or self.is_done:
            return
        if not self._is_planned or (isinstance(event, PlanMade) and event.plan_epoch == self._plan_epoch):
            worker_of(self._stack, self._device).kill()
            self.is_done = True

    def was_within(self, events: list[JobEvent]) -> bool:
        """Whether the worker was lost before the job ran again, or its process was not there to go on."""
        begun = next(n for n, event in enumerate(events) if isinstance(event, PlanChanges) and event.step == self._step)
        after = next(event for event in events[begun + 1 :] if isinstance(event, (Moved, WorkerLost)))
        if isinstance(after, Moved):
            return after.num_went_on < after.num_workers
        return after.worker.device_name == self._device


def run_job(stack: Stack, path: Path, kill: Kill | None = None) -> tuple[list[float], bytes, list[JobEvent]]:
    """Losses, adapter and events of a job, to its end."""
    with stack.client() as client:
        spec = load_spec(path)
        watch = JobWatch(client, job_id := client.submit(spec))
        events: list[JobEvent] = []
        while (event := watch.next(WAIT_S)) is not None:
            events.append(event)
            if kill is not None:
                kill.look(event)
        watch.join()
        job = client.job(job_id)
    assert job.summary.state == "succeeded", f"{job.summary.reason}\n{stack.logs()}"
    assert spec.output.dir is not None
    return losses(job.detail), (Path(spec.output.dir) / "adapter_model.safetensors").read_bytes(), events


@pytest.mark.slow
@pytest.mark.chaos
@pytest.mark.timeout(900)
@pytest.mark.parametrize("is_planned", [False, True], ids=["stopping", "loading"])
@pytest.mark.parametrize("step", [LEAVES_AT, RETURNS_AT], ids=["leaving", "returning"])
def test_worker_killed_in_a_change_of_phase_moves_no_bit(stack: Stack, step: int, is_planned: bool) -> None:
    case = 2 * (step == RETURNS_AT) + is_planned
    draw = random.Random(case)
    for attempt in range(NUM_ATTEMPTS):
        name, first_row = f"job {case} {attempt}", NUM_ROWS * (NUM_ATTEMPTS * case + attempt)
        undisturbed = run_job(stack, job_file(stack, f"calm {name}", first_row, (CALM,)))
        kill = Kill(stack, step, is_planned=is_planned, device=draw.choice(NAMES))
        found = run_job(stack, job_file(stack, name, first_row, NAMES), kill)

        assert not [event for event in undisturbed[2] if isinstance(event, (PlanChanges, WorkerLost))]
        assert kill.is_done
        assert found[:2] == undisturbed[:2]
        if kill.was_within(found[2]):
            return
    pytest.fail(f"of {NUM_ATTEMPTS} kills none came before the job had moved")
