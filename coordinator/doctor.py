"""``plutino doctor``: can this machine be a coordinator, and do the devices of the one that runs reach each other?"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from plutino.client import Client
from plutino.doctor.child import ChildRun, run_child
from plutino.doctor.judge_machine import judge_disk, judge_limits, judge_memory, judge_processor
from plutino.doctor.kernels import judge_kernels, run_kernels
from plutino.doctor.machine import read_disk, read_limits, read_memory, read_processor, sqlite_damage
from plutino.doctor.report import Finding, fail, ok, warn
from plutino.doctor.software import judge_fleet_versions, judge_installed, judge_sqlite
from plutino.doctor.wire import judge_links
from plutino.errors import PlutinoError, UnreachableError
from plutino.versions import installed_versions

_RAY_COMMAND = (sys.executable, "-m", "coordinator.scheduling.ray_backend.probe")
_RAY_TIMEOUT_S = 90.0
"""Ray itself waits 30 s for its first daemon, and is tried twice."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DoctorOptions:
    """What to examine."""

    state_dir: Path
    has_ray: bool = True
    """Start Ray; a coordinator with ``--engine local`` does without."""


def examine_coordinator(
    options: DoctorOptions,
    *,
    run_kernels: Callable[[int], ChildRun] = run_kernels,
    run_ray: Callable[[], ChildRun] = lambda: run_child(_RAY_COMMAND, timeout_s=_RAY_TIMEOUT_S),
) -> list[Finding]:
    """Run all probes, the heavy ones in children, and ask the coordinator that runs, if one does."""
    processor = read_processor()
    return [
        *judge_installed(installed_versions(), extra="coordinator"),
        *judge_memory(read_memory()),
        judge_processor(processor),
        *judge_limits(read_limits()),
        judge_disk("state folder", read_disk(options.state_dir, tries_sync=True)),
        judge_sqlite(sqlite_damage(options.state_dir / "plutino.sqlite")),
        # The coordinator verifies what it publishes with torch, transformers and peft.
        *judge_kernels(run_kernels(processor.useful_threads), extra="coordinator"),
        *([judge_ray(run_ray())] if options.has_ray else []),
        *_examine_running(options.state_dir),
    ]


def judge_ray(run: ChildRun) -> Finding:
    """Whether Ray is there and starts."""
    without = "or do without it: plutino up --engine local"
    reason = "took too long" if run.timed_out else run.reason
    if "installed" not in run.results:
        fix = f"pip install 'plutino[coordinator]' (Ray has 64-bit wheels only), {without}"
        return fail("Ray", f"is not installed: {reason}", fix)
    version = run.results["installed"]["version"]
    if "start" not in run.results:
        return fail("Ray", f"{version} does not start: {reason}", f"free memory (it takes 430 MiB), {without}")
    if run.exit_code:
        said = f"{version} starts, but its end failed: {reason}"
        return warn("Ray", said, "end what is left: ps -C raylet,gcs_server -o pid,args, then kill PID")
    return ok("Ray", f"{version} starts in {run.results['start']['seconds']:.1f} s")


def _examine_running(state_dir: Path) -> list[Finding]:
    try:
        with Client.local(state_dir) as client:
            devices = [device for device in client.devices() if device["state"] == "alive"]
            dials = client.check_links()
    except UnreachableError:
        return [warn("coordinator", f"none runs with {state_dir}: devices were not examined", "plutino up")]
    except PlutinoError as error:
        return [fail("coordinator", str(error), f"see {state_dir / 'coordinator.log'}, then restart: plutino up")]
    if not devices:
        return [warn("coordinator", "runs, no device is in", "on each device: the line that plutino up printed")]
    names = ", ".join(str(device["name"]) for device in devices)
    return [
        ok("coordinator", f"runs; {len(devices)} devices are in: {names}"),
        *judge_fleet_versions(devices),
        judge_links(dials),
    ]
