"""What disturbs a job's driver: losses and people's wishes, none of which may get lost between two attempts."""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass

from plutino.types import WorkerRef


@dataclass(frozen=True, slots=True)
class Loss:
    """Workers whose memory is gone, or cannot be reached any more."""

    refs: tuple[WorkerRef, ...]
    reason: str
    error: str = ""
    """Name of the error class that a worker reported; empty if it did not."""
    is_out_of_memory: bool = False


@dataclass(frozen=True, slots=True)
class CancelWish:
    """A person wants the job to end."""


@dataclass(frozen=True, slots=True)
class PauseWish:
    """A person wants no step to begin."""


@dataclass(frozen=True, slots=True)
class ResumeWish:
    """A person wants a paused job to go on."""


Interrupt = Loss | CancelWish | PauseWish | ResumeWish


class Interrupts:
    """Interrupts in the order they came.

    Waiting takes nothing out. A waiter that did, and was cancelled because the attempt ended in the same moment, would
    take an interrupt with it.
    """

    def __init__(self) -> None:
        self._waiting: deque[Interrupt] = deque()
        self._any = asyncio.Event()

    @property
    def has_any(self) -> bool:
        """Whether :meth:`take` has something to give."""
        return bool(self._waiting)

    def put(self, interrupt: Interrupt) -> None:
        """Add one; never blocks."""
        self._waiting.append(interrupt)
        self._any.set()

    def take(self) -> Interrupt:
        """The oldest one.

        Raises:
            IndexError: there is none.
        """
        interrupt = self._waiting.popleft()
        if not self._waiting:
            self._any.clear()
        return interrupt

    async def wait(self) -> None:
        """Wait until there is one."""
        await self._any.wait()
