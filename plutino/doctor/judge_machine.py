"""What a machine's values mean: pure."""

from __future__ import annotations

from collections.abc import Mapping

from plutino.doctor.machine import Disk, Memory, Processor
from plutino.doctor.report import Finding, fail, ok, warn
from plutino.sizes import GIB, MIB, format_size

LEAST_FREE_BYTES = 1 * GIB
"""Logs, shadows and one block of a small model."""
COMFORTABLE_FREE_BYTES = 10 * GIB
LEAST_MEMORY_BYTES = 600 * MIB
"""A worker's imports take about 350 MiB, the agent 50 MiB."""
_LEAST_FILES = 1024
_SLOW_SYNC_S = 0.05
_USELESS_SYNC_S = 1.0


def judge_memory(memory: Memory, *, budget_bytes: int | None = None) -> list[Finding]:
    """Whether workers have room, and the budget that an owner wants to give."""
    limit = "no cgroup limit"
    if memory.cgroup_limit_bytes is not None:
        limit = f"cgroup limit {format_size(memory.cgroup_limit_bytes)}"
    said = (
        f"{format_size(memory.total_bytes)} in all, {format_size(memory.available_bytes)} available, {limit}, "
        f"swap {format_size(memory.swap_bytes)}"
    )
    more = "give this machine or its container more memory (docker run --memory, systemctl edit: MemoryMax=)"
    if memory.usable_bytes < LEAST_MEMORY_BYTES:
        return [fail("memory", f"{said}; a worker needs {format_size(LEAST_MEMORY_BYTES)}", more)]
    if min(memory.usable_bytes, memory.available_bytes) < LEAST_MEMORY_BYTES:
        return [warn("memory", f"{said}; a worker needs {format_size(LEAST_MEMORY_BYTES)}", "end other programs here")]
    findings = [ok("memory", said)]
    if budget_bytes is not None:
        findings.append(_judge_budget(memory, budget_bytes))
    return findings


def _judge_budget(memory: Memory, budget_bytes: int) -> Finding:
    said = f"--memory {format_size(budget_bytes)} of {format_size(memory.usable_bytes)}"
    if budget_bytes > memory.usable_bytes:
        fitting = f"--memory {memory.usable_bytes * 3 // 4 // MIB}MiB"
        return fail("memory budget", f"{said}: more than there is", f"start the agent with {fitting}")
    if budget_bytes > memory.available_bytes:
        free = f"{format_size(memory.available_bytes)} is available now"
        fitting = f"--memory {memory.available_bytes * 9 // 10 // MIB}MiB"
        return warn("memory budget", f"{said}: {free}", f"end other programs here, or start the agent with {fitting}")
    return ok("memory budget", said)


def judge_processor(processor: Processor, *, threads: int | None = None) -> Finding:
    """Whether workers may use the cores that they will ask for."""
    quota = "no quota" if processor.quota_cores is None else f"quota {processor.quota_cores:.3g} cores"
    said = f"{processor.num_cores} cores, {processor.num_allowed} allowed by affinity, {quota}"
    if threads is None:
        return ok("processor", f"{said}; --threads {processor.useful_threads} uses it fully")
    said += f", --threads {threads}"
    if threads > processor.useful_threads:
        # Two threads under a quota of one core: 72 GFLOP/s where one thread gives 147.
        why = "threads beyond the quota slow each other down"
        return warn("processor", f"{said}: {why}", f"start the agent with --threads {processor.useful_threads}")
    return ok("processor", said)


def judge_limits(limits: Mapping[str, int | None]) -> list[Finding]:
    """Whether resource limits of the shell or the service stop workers."""
    files = limits["NOFILE"]
    said = "no limit" if files is None else f"{files} files"
    findings = [ok("open files", said)]
    if files is not None and files < _LEAST_FILES:
        fix = f"ulimit -n {_LEAST_FILES} (service: LimitNOFILE={_LEAST_FILES})"
        findings = [warn("open files", f"{said}; {_LEAST_FILES} are enough", fix)]
    for name, option, service in (("DATA", "d", "LimitDATA"), ("AS", "v", "LimitAS")):
        limit_bytes = limits[name]
        if limit_bytes is None:
            continue
        said = f"RLIMIT_{name} is {format_size(limit_bytes)}"
        fix = f"ulimit -{option} unlimited (service: {service}=infinity)"
        # Address space counts mappings that are never touched: imports alone map gigabytes.
        least_bytes = LEAST_MEMORY_BYTES if name == "DATA" else 8 * GIB
        if limit_bytes < least_bytes:
            findings.append(fail("memory limits", f"{said}; workers set their own", fix))
        else:
            findings.append(warn("memory limits", f"{said}, which caps every worker", fix))
    if all(limits[name] is None for name in ("DATA", "AS")):
        findings.append(ok("memory limits", "none; workers set their own"))
    return findings


def judge_disk(what: str, disk: Disk) -> Finding:
    """Whether a folder can be written and has room."""
    said = f"{format_size(disk.free_bytes)} free at {disk.path}"
    if disk.sync_s is not None:
        said += f", fsync {disk.sync_s * 1e3:.1f} ms"
    if not disk.is_writable:
        return fail(what, f"{disk.path} cannot be written", f'sudo install -d -o "$USER" {disk.path}')
    room = f"free space on the file system of {disk.path} (du -xh --max-depth=2 ~ | sort -h), or choose another folder"
    if disk.free_bytes < LEAST_FREE_BYTES:
        return fail(what, f"{said}; at least {format_size(LEAST_FREE_BYTES)} is needed", room)
    if disk.sync_s is not None and disk.sync_s > _USELESS_SYNC_S:
        return fail(what, f"{said}: every step waits for it", "choose a --state-dir on another disk, not a network one")
    if disk.sync_s is not None and disk.sync_s > _SLOW_SYNC_S:
        return warn(what, f"{said}: every step waits for it", "choose a --state-dir on an SSD")
    if disk.free_bytes < COMFORTABLE_FREE_BYTES:
        return warn(what, f"{said}; weights of a 3B model take 6 GiB", room)
    return ok(what, said)
