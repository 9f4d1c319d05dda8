"""One contender's run in a process of its own: ``python -m benchmarks.pac_run ORDER.json``, started by benchmarks.pac.

A fleet, a coordinator and agents are started anew, so that nothing is left of the run before. The clock begins with the
submit and ends when the adapter is saved.
"""

from __future__ import annotations

import json
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.cores import apart, pinned
from benchmarks.job_watch import JobWatch
from benchmarks.measure import write_results
from benchmarks.pac_contenders import Contender, contenders, job_values, scaling_contenders
from benchmarks.pac_figures import RunFigures, Seen, figures_of
from benchmarks.pac_planner import PacPlanner
from benchmarks.pac_ray_train import train_on_fleet
from benchmarks.pac_shapes import SHAPES
from benchmarks.peers.trainer import train_apart
from benchmarks.testbed import LocalFleet
from coordinator.jobs.offline_planning import offline_problem
from coordinator.jobs.tracing import is_recorded
from partitioner.fleet_file import FleetFile
from plutino.client import Client
from plutino.errors import PlutinoError
from plutino.events import JobEvent, Notice, StepCommitted
from plutino.job.spec import parse_spec
from plutino.types import JobId


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """Everything that a run is told."""

    shape: str
    contender: str
    is_scaling: bool
    model_dir: str
    rows_path: str
    out: str
    """File of the figures."""
    cores: tuple[int, ...]
    num_agents: int
    cores_per_agent: int
    memory: str
    rate: str
    latency_ms: float
    epochs: int
    batch_size: int
    micro_batch_size: int | None
    codec: str
    device: str
    """Where agents, and the Trainer, compute."""
    timeout_s: float
    quota: float | None
    """Of a processor for each core of an agent, where agents share them."""

    def to_json(self) -> str:
        """For the process's file."""
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> Order:
        """Inverse of :meth:`to_json`."""
        values = json.loads(text)
        return Order(**{**values, "cores": tuple(values["cores"])})

    def who(self) -> Contender:
        """The contender."""
        shape = SHAPES[self.shape]
        all_of = (
            scaling_contenders(self.codec)
            if self.is_scaling
            else contenders(shape, num_agents=self.num_agents, codec=self.codec)
        )
        return next(each for each in all_of if each.name == self.contender)

    def fleet(self) -> FleetFile:
        """The devices; all threads are equally quick."""
        contender = self.who()
        threads = contender.threads or (self.cores_per_agent,) * self.num_agents
        devices = [
            {"name": f"agent{i}", "memory": self.memory, "flops": 5e10 * count * (self.quota or 1.0), "threads": count}
            for i, count in enumerate(threads)
        ]
        values = {"devices": devices, "rate": contender.rate or self.rate, "latency_ms": self.latency_ms}
        return FleetFile.model_validate(values)


def main() -> None:
    """Run what the order says and write its figures."""
    # Whoever ordered it ends it so; what it started ends with it.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    order = Order.from_json(Path(sys.argv[1]).read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory(prefix="plutino-pac-") as work:
        run = {"trainer": _trainer, "ray train": _ray_train}.get(order.who().kind, _job)
        figures = run(order, Path(work))
    write_results(Path(order.out), figures.to_dict())


def _job(order: Order, work: Path) -> RunFigures:
    contender, shape, fleet = order.who(), SHAPES[order.shape], order.fleet()
    state_dir = work / "state"
    state_dir.mkdir()

    def values(num_stages: int | None) -> dict[str, Any]:
        return job_values(
            contender,
            shape,
            model_dir=Path(order.model_dir),
            rows_path=Path(order.rows_path),
            out_dir=work / "adapter",
            devices=[name for device in fleet.devices for name in device.names],
            epochs=order.epochs,
            batch_size=order.batch_size,
            micro_batch_size=order.micro_batch_size,
            num_stages=num_stages,
        )

    notes = []
    num_stages = None if contender.stages == "pac" else contender.stages
    if contender.stages == "pac":
        groups = pac_groups(values(None), fleet, work)
        num_stages = len(groups)
        notes.append(f"PAC's planner: {'-'.join(map(str, groups))} devices a stage")
    spec = parse_spec(values(num_stages), base_dir=work)
    with (
        LocalFleet(fleet, state_dir, cores=order.cores, device=order.device, quota=order.quota) as bed,
        pinned(bed.own_cores),
    ):
        notes += [*bed.notes, f"links as measured, Mbit/s and ms: {_links(bed)}"]
        started_s = time.monotonic()
        watch = JobWatch(bed.stack.client, bed.stack.client.submit(spec))
        seen: list[tuple[float, JobEvent]] = []
        while (event := watch.next(max(1.0, order.timeout_s - (time.monotonic() - started_s)))) is not None:
            seen.append((time.monotonic() - started_s, event))
        watch.join()
        _write_events(Path(order.out).with_suffix(".events.jsonl"), bed.stack.client, watch.job_id, seen)
        notes += bed.relay_notes()
        cached_bytes = sum(path.stat().st_size for path in (state_dir / "caches").rglob("*.data"))
    notes += _warnings(seen)
    return figures_of(seen, batch_size=order.batch_size, cached_bytes=cached_bytes, notes=notes)


def _write_events(path: Path, client: Client, job_id: JobId, seen: Seen) -> None:
    """All that the job told, and the steps that its workers recorded span by span: where the seconds went."""
    steps = [event for _, event in seen if isinstance(event, StepCommitted)]
    lines = [{"at_s": heard_s, "kind": event.kind, **event.model_dump(mode="json")} for heard_s, event in seen]
    for steps_of_plan in _by_plan(steps):
        found = [step for step in steps_of_plan if is_recorded(step, start_step=steps_of_plan[0], end_step=len(steps))]
        # The first ones are of an epoch in which all blocks run; later ones may be of the cache.
        lines += [_recorded(client, job_id, step) for step in dict.fromkeys((*found[:1], *found[-1:]))]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def _by_plan(steps: Sequence[StepCommitted]) -> list[list[int]]:
    """Steps of each plan epoch, in order."""
    found: dict[int, list[int]] = {}
    for event in steps:
        found.setdefault(event.plan_epoch, []).append(event.step)
    return list(found.values())


def _recorded(client: Client, job_id: JobId, step: int) -> dict[str, Any]:
    try:
        return {"trace": json.loads(client.trace(job_id, step)[0])}
    except PlutinoError as error:
        return {"step": step, "no_trace": str(error)}


def _warnings(seen: Seen) -> list[str]:
    return [event.text for _, event in seen if isinstance(event, Notice) and event.level == "warning"]


def _links(bed: LocalFleet) -> str:
    rates = [bytes_per_s * 8e-6 for bytes_per_s, _ in bed.links().values()]
    latencies = [latency_s * 1e3 for _, latency_s in bed.links().values()]
    if not rates:
        return "none"
    return f"{min(rates):.0f} to {max(rates):.0f}, {min(latencies):.2f} to {max(latencies):.2f}"


def pac_groups(values: dict[str, Any], fleet: FleetFile, base_dir: Path) -> list[int]:
    """Devices of each stage, as PAC's planner chooses them for a job on a fleet."""
    problem = offline_problem(parse_spec(values, base_dir=base_dir), fleet)
    plan = PacPlanner(problem.table, problem.shape, problem.devices, problem.links).plan()
    if plan is None:
        raise SystemExit("out of memory by PAC's own model of it")
    return [len(group) for group in plan.layout]


def _trainer(order: Order, work: Path) -> RunFigures:
    _, available = apart(order.cores)
    cores = available[: order.cores_per_agent]
    values = {**_peft_order(order, work), "use_cpu": order.device == "cpu"}
    return train_apart(values, work, cores=cores, threads=order.cores_per_agent, timeout_s=order.timeout_s)


def _ray_train(order: Order, work: Path) -> RunFigures:
    return train_on_fleet(
        _peft_order(order, work),
        order.fleet(),
        work,
        cores=order.cores,
        quota=order.quota,
        timeout_s=order.timeout_s,
    )


def _peft_order(order: Order, work: Path) -> dict[str, Any]:
    """What the peers with peft are told."""
    return {
        "model_dir": order.model_dir,
        "rows_path": order.rows_path,
        "out_dir": str(work / "adapter"),
        "is_seq2seq": SHAPES[order.shape].is_seq2seq,
        "method": dict(order.who().method),
        "epochs": order.epochs,
        "batch_size": order.batch_size,
    }


if __name__ == "__main__":
    main()
