"""A worker process as the agent sees it: started, spoken to, watched, ended, reaped.

The agent writes JSON lines to the worker's stdin (``{"profile": ...}``, ``{"go_on": ...}``, ``{"assign": ...}``); the
worker writes JSON lines to a pipe of its own (``{"ready": ...}``, ``{"reached": ...}``, ``{"profile": ...}``,
``{"exiting": ...}``), so that nothing a library prints can be taken for an event. The end of stdin tells the worker
that its agent is gone.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from partitioner.product_code import product_code_environment
from plutino.sizes import MIB, SMALLEST_MAPPING_BYTES

logger = logging.getLogger(__name__)

Event = dict[str, Any]

_MAX_EVENT_BYTES = MIB
_DRAIN_S = 1.0

MALLOC_TUNABLES = f"glibc.malloc.mmap_threshold={SMALLEST_MAPPING_BYTES}"
"""Gives every block of 256 KiB or more its own mapping and gives it back when freed, so that resident memory is what
tensors take. On the heap, glibc 2.36 cannot put an aligned block into a hole of its own size: resident memory grew to
twice the live tensors (measured, 172 MiB live: 179 MiB so, 351 MiB with a threshold of 32 MiB, for 30 % more
processor time at hidden size 384). Where the budget has room for that, edge_node.guard.keep_heap chooses speed."""


def worker_environment(
    threads: int, *, malloc_arena_max: int = 2, glibc_tunables: str = MALLOC_TUNABLES
) -> dict[str, str]:
    """Environment of a worker, added to the agent's own.

    These are read once, when a program or a library starts, so they cannot be set in the worker. Few arenas, because
    each keeps free memory for itself and the budget counts all of it; few kept products for the same reason.
    """
    return {
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        # Threads that wait for their next piece of work sleep instead of spinning: the core may be another stage's.
        "OMP_WAIT_POLICY": "PASSIVE",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "GLIBC_TUNABLES": glibc_tunables,
        "MALLOC_ARENA_MAX": str(malloc_arena_max),
        **product_code_environment(),
        # What a worker wrote before it was killed must be in its log, and so must where it crashed.
        "PYTHONUNBUFFERED": "1",
        "PYTHONFAULTHANDLER": "1",
    }


class WorkerProcess:
    """One running worker process. Made by :meth:`start`; every one made must be awaited with :meth:`wait`."""

    def __init__(
        self, process: asyncio.subprocess.Process, events: asyncio.StreamReader, transport: asyncio.BaseTransport
    ) -> None:
        self._process = process
        self._events = events
        self._transport = transport
        self._stopping: asyncio.Task[None] | None = None
        self.violation: str | None = None
        """What the worker wrote that it must not, and was killed for."""

    @classmethod
    async def start(cls, command: Sequence[str], threads: int, log_path: Path) -> WorkerProcess:
        """Start ``command --events-fd N --threads T`` with its output in a log file.

        Raises:
            OSError: the process could not be started.
        """
        loop = asyncio.get_running_loop()
        read_fd, write_fd = os.pipe()
        events = asyncio.StreamReader(limit=_MAX_EVENT_BYTES, loop=loop)
        try:
            transport, _ = await loop.connect_read_pipe(
                lambda: asyncio.StreamReaderProtocol(events, loop=loop), os.fdopen(read_fd, "rb", buffering=0)
            )
            try:
                with log_path.open("ab") as log:
                    process = await asyncio.create_subprocess_exec(
                        *command,
                        "--events-fd",
                        str(write_fd),
                        "--threads",
                        str(threads),
                        stdin=asyncio.subprocess.PIPE,
                        stdout=log,
                        stderr=log,
                        pass_fds=(write_fd,),
                        env={**os.environ, **worker_environment(threads)},
                        # Ctrl-C in the agent's terminal must reach the agent alone, which then ends its workers.
                        start_new_session=True,
                    )
            except BaseException:
                transport.close()
                raise
        finally:
            os.close(write_fd)
        return cls(process, events, transport)

    @property
    def pid(self) -> int:
        """Process id."""
        return self._process.pid

    def send(self, message: Mapping[str, object]) -> None:
        """Queue a JSON line for the worker's stdin; to a process that has ended it goes nowhere."""
        assert self._process.stdin is not None
        if not self._process.stdin.is_closing():
            self._process.stdin.write(json.dumps(message).encode() + b"\n")

    def kill(self) -> None:
        """End the process at once."""
        if self._process.returncode is None:
            self._process.kill()

    def stop(self, grace_s: float) -> None:
        """Begin to end the process: SIGTERM, and SIGKILL if it still runs ``grace_s`` seconds later."""
        if self._stopping is None and self._process.returncode is None:
            self._process.terminate()
            self._stopping = asyncio.create_task(self._kill_after(grace_s))

    async def wait(self, on_event: Callable[[Event], None]) -> int:
        """Pass every event on until the process has ended and is reaped; returns its exit code (-n: by signal n).

        A worker that breaks the protocol is killed.
        """
        reading = asyncio.create_task(self._read(on_event))
        try:
            exit_code = await self._process.wait()
            # Events may still lie in the pipe. Not waited for longer: a child of the worker may hold it open.
            await asyncio.wait({reading}, timeout=_DRAIN_S)
        finally:
            reading.cancel()
            if self._stopping is not None:
                self._stopping.cancel()
            self._transport.close()
            if self._process.stdin is not None:
                self._process.stdin.close()
        return exit_code

    async def _read(self, on_event: Callable[[Event], None]) -> None:
        while True:
            try:
                line = await self._events.readline()
                if not line:
                    return
                event = json.loads(line)
                if not isinstance(event, dict):
                    raise ValueError(f"not an object: {line[:80]!r}")
                on_event(event)
            except (ValueError, KeyError, TypeError) as error:
                self.violation = f"the worker wrote a malformed event ({error!r})"
                self.kill()
                return

    async def _kill_after(self, grace_s: float) -> None:
        await asyncio.sleep(grace_s)
        logger.warning("worker process %d did not end within %.1f s and is killed", self.pid, grace_s)
        self.kill()
