"""Seconds that a stage computed in a unit: by the program's clock on a processor, by the card's own on a card.

A card works on beside the program, which only queues kernels; what it took is known once it is through. Where a quota
bounds the processor, as containers are, a stage that waits now and then runs its passes at full speed on what it saved
meanwhile: it counts as slow as it would be without a pause, which is what its profile says.
"""

from __future__ import annotations

import time

import torch


class PassClock:
    """Adds up the seconds of forward and backward passes.

    Args:
        device: where they run.
        quota: processors that this process may use at the most, all threads together; None: nothing bounds it.
    """

    def __init__(self, device: torch.device, quota: float | None = None) -> None:
        self._stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
        self._quota = quota
        self._started_s = (0.0, 0.0)
        self._seconds = 0.0
        self._used_s = 0.0
        self._started: torch.cuda.Event | None = None
        self._on_card: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def start(self) -> None:
        """A pass begins."""
        if self._stream is None:
            self._started_s = time.perf_counter(), time.process_time()
        else:
            self._started = self._mark()

    def end(self) -> None:
        """It is done, or queued."""
        if self._stream is None:
            started_s, used_s = self._started_s
            self._seconds += time.perf_counter() - started_s
            self._used_s += time.process_time() - used_s
        else:
            assert self._started is not None, "start comes first"
            self._on_card.append((self._started, self._mark()))

    def seconds(self) -> float:
        """Of all passes so far; waits for the card."""
        if self._on_card:
            self._on_card[-1][1].synchronize()
        self._seconds += sum(start.elapsed_time(end) for start, end in self._on_card) / 1000
        self._on_card = []
        return self._seconds if self._quota is None else max(self._seconds, self._used_s / self._quota)

    def _mark(self) -> torch.cuda.Event:
        assert self._stream is not None
        mark = torch.cuda.Event(enable_timing=True)
        mark.record(self._stream)
        return mark
