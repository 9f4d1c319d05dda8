"""The worker process: imports once, then profiles on request, then runs one stage of one job and ends.

Its agent starts it before there is a job, because importing torch and transformers takes seconds. It speaks with the
agent in JSON lines: commands on stdin, answers on a descriptor of their own (libraries print to stdout). When the
agent ends, stdin ends, and so does the worker. Where the job asks for it, the worker says that it is idle instead of
ending, keeps the stage as it was loaded, and runs the next job of the same stage. At a move of its job it gives the
stage back, keeps what it trained, and runs its part of the next plan. Its agent bounds how long it waits.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import os
import queue
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Any

from edge_node.meeting import HostMeeting
from edge_node.network import DeviceNetwork
from edge_node.weights_config import WeightsConfig
from edge_node.worker_imports import import_behind_others
from plutino.dtypes import offered_dtypes, slow_dtypes
from plutino.errors import AgentError, OutOfMemoryError, PlutinoError
from plutino.job.assignment import WorkerAssignment
from plutino.versions import installed_versions

if TYPE_CHECKING:
    from edge_node.compute_device import ComputeDevice
    from edge_node.going_on import KeptState
    from edge_node.stage.resident import ResidentStage

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class _Kept:
    """What a process that goes on has of its job before; one of the two."""

    stage: ResidentStage | None = None
    state: KeptState | None = None

    def take(self, assignment: WorkerAssignment) -> tuple[ResidentStage | None, KeptState | None]:
        """What the job has a use for; all else is given back before its stage is loaded."""
        stage, state = self.stage, self.state
        self.stage = self.state = None
        if stage is not None and stage.key != assignment.stage_key:
            stage = None
        return stage, state if state is not None and state.job_id == assignment.job_id else None


class _Events:
    """JSON lines to the agent."""

    def __init__(self, descriptor: int) -> None:
        self._file: IO[str] = os.fdopen(descriptor, "w", buffering=1)

    def send(self, **event: Any) -> None:
        try:
            self._file.write(json.dumps(event) + "\n")
        except BrokenPipeError:
            # The agent is gone; the watch on stdin ends this process.
            logger.warning("the agent no longer listens")


def main() -> int:
    """Entry point of ``python -m edge_node.worker``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--events-fd", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--yields", action="store_true", help="a job runs on this device: import behind it")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    events = _Events(arguments.events_fd)
    try:
        if arguments.yields:
            import_behind_others()
        device, ready = _prepare(arguments.threads, arguments.device)
    except Exception as error:
        events.send(exiting={"reason": f"cannot start: {error}", "out_of_memory": False, "error": "AgentError"})
        raise
    events.send(ready=ready)
    commands = _Commands()
    code = 0
    kept: _Kept | None = _Kept()
    while kept is not None and (command := commands.take()) is not None:
        if "profile" in command:
            events.send(profile=_profile(command["profile"], device, commands, events))
        elif "assign" in command:
            network = DeviceNetwork.from_json(command.get("network", {}))
            weights = WeightsConfig.from_json(command.get("weights", {}))
            assignment = WorkerAssignment.model_validate(command["assign"])
            commands.end_process_with_agent()
            code, kept = _run_job(
                assignment, network, weights, device, events, kept, baseline_bytes=ready["baseline_bytes"]
            )
        else:
            raise AgentError(f"unknown command from the agent: {sorted(command)}")
    return code


class _Commands:
    """JSON lines from the agent, read by a thread: while a job runs, their end is the end of the process."""

    def __init__(self) -> None:
        self._lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._has_ended = False
        self._ends_process = False
        self._meeting: HostMeeting | None = None
        threading.Thread(target=self._read, name="agent-watch", daemon=True).start()

    def take(self) -> dict[str, Any] | None:
        """The next command; None once the agent has ended."""
        line = self._lines.get()
        return None if line is None else dict(json.loads(line))

    @contextmanager
    def passing_on(self, meeting: HostMeeting) -> Iterator[None]:
        """Within it the meeting hears at once when it may go on: it waits on the thread that takes commands."""
        self._meeting = meeting
        try:
            yield
        finally:
            self._meeting = None

    def end_process_with_agent(self) -> None:
        """From now on nobody takes commands soon enough: the agent's end ends the process."""
        with self._lock:
            self._ends_process = True
            if self._has_ended:
                os._exit(0)

    def _read(self) -> None:
        for line in sys.stdin:
            if (go_on := json.loads(line).get("go_on")) is None:
                self._lines.put(line)
            elif (meeting := self._meeting) is not None:
                meeting.note(go_on["milestone"], is_whole=go_on["is_whole"])
        with self._lock:
            self._has_ended = True
            if self._ends_process:
                logger.info("the agent has ended")
                os._exit(0)
        self._lines.put(None)


def _prepare(threads: int, device_name: str) -> tuple[ComputeDevice, dict[str, Any]]:
    """Import, warm up and measure what a worker costs before any job."""
    import torch

    from edge_node import session  # what a job needs is part of the baseline, not of the job
    from edge_node.compute_device import open_device
    from edge_node.profile import probe_dtypes, warm_up

    device = open_device(device_name)
    torch.set_num_threads(threads)
    logger.info("warming up for %s", session.WorkerSession.__name__)
    warm_up(device)
    dtype_seconds = probe_dtypes(device)
    device.release()
    # What imports left lives as long as the process: a collection need not look at 390,000 objects for 0.2 s each time.
    gc.freeze()
    return device, {
        "baseline_bytes": device.held_bytes(),
        "dtypes": offered_dtypes(dtype_seconds),
        "slow_dtypes": slow_dtypes(dtype_seconds),
        "versions": installed_versions(),
        "hardware": device.describe(),
    }


def _profile(request: dict[str, Any], device: ComputeDevice, commands: _Commands, events: _Events) -> dict[str, Any]:
    from edge_node.profile import measure
    from partitioner.device import ProfileRequest

    try:
        asked = ProfileRequest.model_validate(request)
        if not asked.beside:
            return {"timings": measure(asked, device).all_s}
        meeting = HostMeeting(lambda milestone: events.send(reached=milestone))
        with commands.passing_on(meeting):
            return {"timings": measure(asked, device, meeting).all_s, "lacked_company": not meeting.is_whole}
    except Exception as error:
        logger.exception("profiling failed")
        return {"error": f"{type(error).__name__}: {error}"}
    finally:
        device.release()


def _run_job(
    assignment: WorkerAssignment,
    network: DeviceNetwork,
    weights: WeightsConfig,
    device: ComputeDevice,
    events: _Events,
    kept: _Kept,
    *,
    baseline_bytes: int,
) -> tuple[int, _Kept | None]:
    """Run a job to its end; gives the exit code, and what the worker shall wait with, if it shall."""
    import torch

    from edge_node.going_on import MOST_LEFT_BYTES, WAITS_S, left_after_release
    from edge_node.guard import reset_peak
    from edge_node.session import WorkerSession
    from partitioner.product_code import untouched_code_bytes

    torch.set_num_threads(assignment.threads)
    reset_peak()
    try:
        device.hold_to(
            assignment.memory_budget_bytes,
            keeps_heap=assignment.keeps_heap,
            untouched_bytes=untouched_code_bytes(assignment.numerics.dtype),
        )
        # The session alone holds what was kept, and lets go of it once it is loaded.
        session = WorkerSession(assignment, network, weights, device, *kept.take(assignment))
        reason = session.run()
    except PlutinoError as error:
        logger.error("%s", error)
        is_memory = isinstance(error, OutOfMemoryError)
        events.send(exiting={"reason": str(error), "out_of_memory": is_memory, "error": type(error).__name__})
        return error.exit_code, None
    except Exception as error:
        logger.exception("the worker failed")
        reason = f"{type(error).__name__}: {error}"
        events.send(exiting={"reason": reason, "out_of_memory": False, "error": type(error).__name__})
        return 1, None
    if session.goes_on:
        state = session.take_state()
        del session
        if state is not None:
            left_bytes = left_after_release(device, baseline_bytes, state.num_bytes)
            if left_bytes <= MOST_LEFT_BYTES:
                events.send(going_on={"waits_s": WAITS_S, "left_bytes": left_bytes, "reason": reason})
                return 0, _Kept(state=state)
    elif (stage := session.take_stage()) is not None:
        del session
        device.release()
        events.send(idle={"stage_key": stage.key, "keeps_stage_s": assignment.keeps_stage_s, "reason": reason})
        return 0, _Kept(stage)
    events.send(exiting={"reason": reason, "out_of_memory": False, "error": ""})
    return 0, None


if __name__ == "__main__":
    code = main()
    logging.shutdown()
    # Threads of gRPC and of torch may still hold the interpreter; everything of ours is closed.
    os._exit(code)
