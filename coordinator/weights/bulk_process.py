"""The bulk process as the coordinator starts and ends it."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from contextlib import AsyncExitStack
from pathlib import Path

from plutino.errors import JobError

_START_TIMEOUT_S = 30.0


async def start_bulk(
    stack: AsyncExitStack, *, address: str, state_dir: Path, rate_bytes_per_s: int, identity: Path | None
) -> str:
    """Start it, and let ``stack`` end it; gives where it listens.

    Args:
        stack: of the coordinator.
        address: where it listens: the port it had before, so that workers that outlived a restart still reach it.
        state_dir: the coordinator's.
        rate_bytes_per_s: cap on what it sends; 0 means none.
        identity: the coordinator's identity file; None without TLS.

    Raises:
        JobError: it did not start.
    """
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "coordinator.weights.bulk",
        "--address",
        address,
        "--state-dir",
        str(state_dir),
        "--rate-bytes-per-s",
        str(rate_bytes_per_s),
        "--parent-pid",
        str(os.getpid()),
        *(() if identity is None else ("--identity", str(identity))),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    stack.push_async_callback(_stop_process, process)
    assert process.stdout is not None
    try:
        line = await asyncio.wait_for(process.stdout.readline(), _START_TIMEOUT_S)
    except asyncio.TimeoutError:
        raise JobError(f"the bulk process did not start within {_START_TIMEOUT_S:.0f} s") from None
    if not line:
        raise JobError(f"the bulk process ended with exit code {await process.wait()}; its message is above")
    bound: str = json.loads(line)["address"]
    return bound


async def _stop_process(process: asyncio.subprocess.Process) -> None:
    if process.returncode is None:
        process.terminate()
        try:
            await asyncio.wait_for(process.wait(), 5.0)
        except asyncio.TimeoutError:
            process.kill()
            await process.wait()
