"""The run of :mod:`benchmarks.peers.ray_train` on the processors that a fleet's agents would have, and its figures.

The clock begins with the process, which starts Ray, and ends when rank 0 has saved the adapter: what Ray takes to tell
the driver so and to end is not counted. Coordinator and agents of our own runs are up when their clock begins, so the
seconds that Ray's start takes are told apart, in the notes.
"""

from __future__ import annotations

import itertools
import json
import os
import statistics
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks.agent_processors import AgentProcessors, agent_processors
from benchmarks.cores import pinned
from benchmarks.pac_figures import RunFigures
from benchmarks.peers.ray_train import RAY_FOLDER
from benchmarks.processor_quota import ProcessorQuota
from coordinator.demo.children import Children
from partitioner.fleet_file import FleetFile
from plutino.errors import ConfigError

LINKS_NOTE = "gradients over loopback, not over the fleet's links: to its advantage"
_SOCKET_PATH_BYTES = 107
_SOCKET_SUFFIX_BYTES = len("/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store")


def import_refusal() -> str | None:
    """Why Ray Train cannot be used here; None: it can. Takes seconds, the first time."""
    try:
        import ray.train.torch  # noqa: F401
    except ImportError as error:
        return f"Ray Train cannot be imported: {' '.join(str(error).split())}"
    return None


def train_on_fleet(
    order: Mapping[str, Any],
    fleet: FleetFile,
    work: Path,
    *,
    cores: Sequence[int],
    quota: float | None,
    timeout_s: float,
) -> RunFigures:
    """Run it; no process of it is left, however this ends.

    Args:
        order: see :data:`benchmarks.peers.peft_job.Order`.
        fleet: the devices; a worker stands for each.
        work: an existing folder of this run's own.
        cores: processors for all of it, shared out as :class:`benchmarks.testbed.LocalFleet` does.
        quota: of a processor for each thread, see :func:`benchmarks.agent_processors.agent_processes`.
        timeout_s: for the whole run.

    Raises:
        ConfigError: a step's rows cannot be cut, or the folder's path is too long for Ray.
        PlutinoError: it failed, or took too long.
    """
    processors = agent_processors(fleet, cores, quota=quota)
    refuse_uneven(order["batch_size"], len(processors.agents))
    refuse_long(work)
    with ExitStack() as ending:
        quotas = {name: ending.enter_context(each) for name, each in processors.quotas().items()}
        path = work / "order.json"
        path.write_text(json.dumps({**order, "workers": places_of(processors, quotas)}), encoding="utf-8")
        children = ending.enter_context(Children(work))
        started_s = time.monotonic()
        with pinned(processors.own):
            child = children.start("ray-train", "-m", "benchmarks.peers.ray_train", str(path), str(work))
        children.wait_for_end(child, timeout_s)
    names = [agent.name for agent in processors.agents]
    told = [json.loads((work / f"worker{rank}.json").read_text(encoding="utf-8")) for rank in range(len(names))]
    driver = json.loads((work / "driver.json").read_text(encoding="utf-8"))
    return figures_of_workers(
        dict(zip(names, told, strict=True)), driver, started_s=started_s, notes=(LINKS_NOTE, *processors.notes)
    )


def places_of(processors: AgentProcessors, quotas: Mapping[str, ProcessorQuota]) -> list[dict[str, Any]]:
    """Where the worker of each rank computes, with how many threads: as the agent of the same index."""
    return [
        {
            "cores": sorted(processors.cores[agent.name]),
            "threads": agent.threads,
            "cgroup": str(quotas[agent.name].folder) if agent.name in quotas else None,
        }
        for agent in processors.agents
    ]


def refuse_uneven(batch_size: int, num_workers: int) -> None:
    """DDP takes the mean of the workers' means, which is a step's only if they have as many rows each.

    Raises:
        ConfigError: they have not.
    """
    if batch_size % num_workers:
        raise ConfigError(
            f"the {batch_size} rows of a step cannot be cut into equal parts for {num_workers} workers of Ray Train; "
            f"take a --batch-size that {num_workers} divides"
        )


def refuse_long(work: Path) -> None:
    """The kernel takes no longer paths of sockets.

    Raises:
        ConfigError: Ray's sockets below this folder would have such ones.
    """
    most = _SOCKET_PATH_BYTES - _SOCKET_SUFFIX_BYTES - len(f"/{RAY_FOLDER}")
    if (length := len(os.fsencode(work))) > most:
        raise ConfigError(
            f"{work} has {length} bytes, and Ray's sockets may lie below at most {most}; set TMPDIR to a shorter path"
        )


def figures_of_workers(
    told: Mapping[str, Mapping[str, Any]],
    driver: Mapping[str, float],
    *,
    started_s: float,
    notes: Sequence[str] = (),
) -> RunFigures:
    """A run's figures.

    Args:
        told: by device, what its worker wrote; rank 0 is first, whose clock is everybody's, because each step waits for
            all gradients.
        driver: what the driver wrote.
        started_s: when the process was started, by the same clock.
        notes: what whoever reads the figures should know.
    """
    first = next(iter(told.values()))
    epochs: list[list[float]] = first["at_s"]
    steps_s = [[after - before for before, after in itertools.pairwise(at_s)] for at_s in epochs]
    # Ray's report of an epoch is the epoch's, but for the last one's, which is told with the end.
    ends_s = [*(at_s[0] for at_s in epochs[1:]), epochs[-1][-1]]
    epoch_s = [end_s - at_s[0] for at_s, end_s in zip(epochs, ends_s, strict=True)]
    saved_s = first["saved_at_s"]
    told_s = (
        f"Ray's own cluster was up after {driver['cluster_up_at_s'] - started_s:.1f} s and its workers began after "
        f"{first['began_at_s'] - started_s:.1f} s, which are in the beginning; "
        f"its driver heard of the end {driver['fitted_at_s'] - saved_s:.1f} s after the adapter was saved"
    )
    return RunFigures(
        total_s=saved_s - started_s,
        first_epoch_s=epoch_s[0],
        later_epochs_s=tuple(epoch_s[1:]),
        num_steps=len(steps_s[0]),
        step_s=tuple(statistics.median(of_epoch[1:] or of_epoch) for of_epoch in steps_s),
        begin_s=epochs[0][0] - started_s,
        end_s=saved_s - ends_s[-1],
        job_bytes={name: each["job_bytes"] for name, each in told.items()},
        rss_bytes={name: each["rss_bytes"] for name, each in told.items()},
        losses=tuple(statistics.fmean(of_step) for of_step in zip(*(w["losses"] for w in told.values()), strict=True)),
        notes=(*notes, told_s),
    )
