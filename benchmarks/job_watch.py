"""A job's events with a bound on every wait."""

from __future__ import annotations

import queue
import threading

from benchmarks.contender import ContenderError
from plutino.client import Client, NumberedEvent
from plutino.errors import PlutinoError
from plutino.events import JobEvent, JobStateChanged
from plutino.types import JobId

_RECONNECT_S = 5.0
_END_TIMEOUT_S = 30.0


class JobWatch:
    """Events of a job from its beginning, read by a thread."""

    def __init__(self, client: Client, job_id: JobId) -> None:
        self.job_id = job_id
        self._client = client
        self._events: queue.Queue[NumberedEvent | PlutinoError | None] = queue.Queue()
        self._thread = threading.Thread(target=self._pump, name=f"watch {job_id}", daemon=True)
        self._thread.start()

    def _pump(self) -> None:
        try:
            for numbered in self._client.watch(self.job_id, reconnect_s=_RECONNECT_S):
                self._events.put(numbered)
        except PlutinoError as error:
            self._events.put(error)
        else:
            self._events.put(None)

    def next(self, timeout_s: float) -> JobEvent | None:
        """The next event; None when the job has ended well and everything was told.

        Raises:
            ContenderError: the job failed, was cancelled, or nothing came in time.
        """
        try:
            found = self._events.get(timeout=timeout_s)
        except queue.Empty:
            raise ContenderError(f"nothing was heard of job {self.job_id} for {timeout_s:.0f} s") from None
        if found is None:
            return None
        if isinstance(found, PlutinoError):
            raise ContenderError(f"job {self.job_id} can no longer be watched: {found}") from found
        event = found.event
        if isinstance(event, JobStateChanged) and event.state in ("failed", "cancelled", "parked"):
            raise ContenderError(f"job {self.job_id} is {event.state}: {event.reason}")
        return event

    def join(self) -> None:
        """Wait, within a bound, for the thread of a job that has ended."""
        self._thread.join(_END_TIMEOUT_S)
