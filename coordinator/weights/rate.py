"""A cap on bytes per second, shared by all transfers of a process."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from plutino.errors import ConfigError


class TokenBucket:
    """Bounds the bytes of any time span of t seconds to ``burst_bytes + rate_bytes_per_s * t``.

    Callers take first and wait afterwards, so that a piece larger than the burst passes too, late. Waits queue up:
    who takes later waits longer. Thread-safe.
    """

    def __init__(self, rate_bytes_per_s: int, burst_bytes: int, *, clock: Callable[[], float] = time.monotonic) -> None:
        """A rate of 0 means no cap.

        Raises:
            ConfigError: the rate is negative.
        """
        if rate_bytes_per_s < 0:
            raise ConfigError(f"a rate of {rate_bytes_per_s} bytes/s is negative; 0 means no cap")
        self._rate_bytes_per_s = rate_bytes_per_s
        self._burst_bytes = burst_bytes
        self._clock = clock
        self._lock = threading.Lock()
        self._tokens_bytes: float = burst_bytes
        self._filled_at_s = clock()

    def take(self, num_bytes: int) -> float:
        """Take bytes out of the bucket; returns the seconds to wait before they may move on."""
        if self._rate_bytes_per_s == 0:
            return 0.0
        with self._lock:
            now_s = self._clock()
            refill_bytes = (now_s - self._filled_at_s) * self._rate_bytes_per_s
            self._tokens_bytes = min(self._burst_bytes, self._tokens_bytes + refill_bytes) - num_bytes
            self._filled_at_s = now_s
            return max(0.0, -self._tokens_bytes / self._rate_bytes_per_s)
