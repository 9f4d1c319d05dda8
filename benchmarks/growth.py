"""What grows with the number of devices and jobs: planning, the ledger, the coordinator's memory.

Devices are simulated: each attaches over real gRPC, says hello, and beats. The store is the real one, on this disk. Run
by ``python -m benchmarks.planner --parts growth``.
"""

from __future__ import annotations

import asyncio
import random
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.fleets import llama_table, lora_job, random_fleet, random_links
from benchmarks.stack import PlutinoStack
from coordinator.jobs.lineage import LedgerRow, LedgerStatus
from coordinator.jobs.record import JobRecord, JobState
from coordinator.scheduling.problem import PlanningProblem
from coordinator.scheduling.round import SchedulingAnswer, SchedulingRound, solve
from coordinator.storage.sqlite import SqliteStore
from partitioner.device import DeviceProfile, LinkTable
from partitioner.search import search
from plutino.endpoint import read_endpoint
from plutino.hardware import WIRE_VERSION
from plutino.sizes import GIB, MIB
from plutino.types import JobId
from plutino.wire.channel import Lane, aio_channel
from protos import agents_pb2, agents_pb2_grpc

NUM_DEVICES = (10, 100, 1000)
NUM_JOBS = 100
NUM_QUEUED_JOBS = {10: 100, 100: 20}
"""By devices. A round searches once or twice for each job: 0.2 s over 10 devices, 0.7 s over 100. A search looks at 40
devices at most, so that a thousand cost what a hundred do."""
_ATTACH_TIMEOUT_S = 120.0
_BEATS_S = 5.0


def growth(share: int) -> dict[str, object]:
    """All figures; with ``share`` above 1 that part of the devices and jobs, to see it run."""
    counts = [max(2, count // share) for count in NUM_DEVICES]
    return {
        "planning": [_told(planning(count)) for count in counts],
        "queue": [
            _told(queue(max(2, devices // share), max(2, jobs // share))) for devices, jobs in NUM_QUEUED_JOBS.items()
        ],
        "ledger": _told(ledger(max(2, NUM_JOBS // share), steps_per_job=max(2, 50 // share))),
        "coordinator": [_told(attached(count)) for count in counts],
    }


def _told(figures: dict[str, object]) -> dict[str, object]:
    """Show how far this is: all of it takes minutes."""
    print(f"growth: {figures}", file=sys.stderr, flush=True)
    return figures


def fleet_of(num_devices: int) -> tuple[Sequence[DeviceProfile], LinkTable, Any, Any]:
    """Devices of ten kinds, some links between them, and a model of 80 blocks with its job."""
    generator = random.Random(5)
    table = llama_table(80, 1024)
    shape = lora_job(table, batch_rows=32, micro_batch_rows=2, row_tokens=128)
    kinds, _ = random_fleet(generator, table, shape, min(num_devices, 10), tightness=(1.0, 1.5, 2.5))
    devices = [
        kinds[i % len(kinds)].model_copy(update={"agent_id": f"id-{i}", "name": f"d{i}", "host_id": f"d{i}"})
        for i in range(num_devices)
    ]
    return devices, random_links(generator, devices[:60]), table, shape


def planning(num_devices: int) -> dict[str, object]:
    """One plan over so many devices."""
    devices, links, table, shape = fleet_of(num_devices)
    started_s = time.process_time()
    plan = search(table, shape, devices, links)
    return {
        "devices": num_devices,
        "planning_s": time.process_time() - started_s,
        "step_s": plan.step_s,
        "used_devices": len(plan.agent_ids),
    }


def queue(num_devices: int, num_jobs: int) -> dict[str, object]:
    """One round of scheduling with so many jobs that all came at once, JSON in and out, as the scheduler takes it."""
    devices, links, table, shape = fleet_of(num_devices)
    problem = PlanningProblem(
        job_id="0",
        table=table,
        shape=shape,
        is_micro_batch_free=False,
        label_tokens_per_row=32,
        devices=tuple(devices),
        links=links,
    )
    question = SchedulingRound(
        # Unlike in what no plan depends on: the scheduler would search once for equal jobs.
        queue=tuple(
            problem.model_copy(update={"job_id": str(number), "num_train_rows": number}) for number in range(num_jobs)
        ),
        held=(),
        budgets_bytes={device.agent_id: device.available_bytes for device in devices},
    ).model_dump_json()
    started_s = time.process_time()
    answer = SchedulingAnswer.model_validate_json(solve(question))
    kinds = [verdict.kind for verdict in answer.verdicts]
    held: dict[str, int] = {}
    for verdict in answer.verdicts:
        for one in verdict.held:
            held[one.agent_id] = held.get(one.agent_id, 0) + one.bytes
    over = [d.agent_id for d in devices if held.get(d.agent_id, 0) > d.available_bytes]
    assert not over, f"promised twice: {over[:5]}"
    return {
        "devices": num_devices,
        "jobs": num_jobs,
        "round_s": time.process_time() - started_s,
        "question_bytes": len(question),
        "reserved": kinds.count("reserve"),
        "waiting": kinds.count("wait"),
    }


def ledger(num_jobs: int, *, steps_per_job: int) -> dict[str, object]:
    """Steps of all jobs committed side by side, each job's in order, on this disk."""
    with (
        tempfile.TemporaryDirectory(prefix="plutino-growth-") as folder,
        closing(SqliteStore(Path(folder) / "store.sqlite")) as store,
    ):
        records = [
            store.submit(
                JobRecord(
                    job_id=JobId(f"job-{number}"),
                    name="growth",
                    spec_json="{}",
                    submitted_at_s=0.0,
                    state=JobState.RUNNING,
                    total_steps=steps_per_job,
                )
            ).result()
            for number in range(num_jobs)
        ]
        commits_before = store.num_commits
        started_s, used_s = time.perf_counter(), time.process_time()
        for step in range(steps_per_job):
            after = [replace(record, next_step=step + 1) for record in records]
            row = LedgerRow(
                step=step,
                plan_epoch=1,
                status=LedgerStatus.COMMITTED,
                sample_indices=tuple(range(16)),
                loss=1.0,
                grad_norm=1.0,
                clip_scale=1.0,
                lr=1e-3,
            )
            writes = [store.commit_step(row, old, new, at_s=0.0) for old, new in zip(records, after, strict=True)]
            for write in writes:
                write.result()
            records = after
        rows = num_jobs * steps_per_job
        wall_s = time.perf_counter() - started_s
        return {
            "jobs": num_jobs,
            "rows": rows,
            "rows_per_s": rows / wall_s,
            "processor_s_per_row": (time.process_time() - used_s) / rows,
            "rows_per_transaction": rows / (store.num_commits - commits_before),
        }


def attached(num_devices: int) -> dict[str, object]:
    """A real coordinator with so many devices that say hello and beat once a second."""
    with tempfile.TemporaryDirectory(prefix="plutino-growth-") as folder:
        state_dir = Path(folder)
        with PlutinoStack(state_dir, is_plaintext=True) as stack:
            empty_bytes = stack.coordinator_rss_bytes()
            address = read_endpoint(state_dir)["devices_address"]
            return asyncio.run(_attach(stack, address, num_devices)) | {"empty_rss_bytes": empty_bytes}


async def _attach(stack: PlutinoStack, address: str, num_devices: int) -> dict[str, Any]:
    ended = asyncio.Event()
    channels = [aio_channel(address, Lane.CONTROL) for _ in range(num_devices)]
    streams = [asyncio.create_task(_device(channel, number, ended)) for number, channel in enumerate(channels)]
    try:
        deadline_s = time.monotonic() + _ATTACH_TIMEOUT_S
        while await asyncio.to_thread(_num_alive, stack) < num_devices:
            broken = next((task for task in streams if task.done()), None)
            if broken is not None:
                broken.result()
            if time.monotonic() > deadline_s:
                raise TimeoutError(f"{num_devices} devices did not attach within {_ATTACH_TIMEOUT_S:.0f} s")
            await asyncio.sleep(0.2)
        before_s, started_s = stack.cpu_s(), time.monotonic()
        await asyncio.sleep(_BEATS_S)
        share = (stack.cpu_s() - before_s) / (time.monotonic() - started_s)
        return {
            "devices": num_devices,
            "rss_bytes": stack.coordinator_rss_bytes(),
            "processor_share_of_heartbeats": share,
            "still_alive": await asyncio.to_thread(_num_alive, stack),
        }
    finally:
        ended.set()
        await asyncio.gather(*streams, return_exceptions=True)
        await asyncio.gather(*(channel.close(None) for channel in channels))


async def _device(channel: Any, number: int, ended: asyncio.Event) -> None:
    async def events() -> AsyncIterator[agents_pb2.AgentEvent]:
        yield agents_pb2.AgentEvent(
            hello=agents_pb2.AgentHello(
                agent_id=f"id-{number}",
                name=f"d{number}",
                host_id=f"d{number}",
                memory_budget_bytes=4 * GIB,
                baseline_bytes=350 * MIB,
                threads=4,
                versions={"torch": "2.0", "python": "3.10"},
                dtypes=["fp32"],
                wire_version=WIRE_VERSION,
            )
        )
        while not ended.is_set():
            try:
                await asyncio.wait_for(ended.wait(), 1.0)
            except asyncio.TimeoutError:
                yield agents_pb2.AgentEvent(heartbeat=agents_pb2.Heartbeat(agent_rss_bytes=60 * MIB))

    stub = agents_pb2_grpc.AgentServiceStub(channel)
    async for _ in stub.Attach(events()):
        pass


def _num_alive(stack: PlutinoStack) -> int:
    return sum(device["state"] == "alive" for device in stack.client.devices())
