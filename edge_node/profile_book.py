"""Measured seconds that an agent keeps on disk, so that the next job of the same shape starts without measuring.

An answer belongs to what was asked (the model's config.json, shape, dtype, packing, method, threads, and who of the
host measures meanwhile) and to the machine that was measured (versions of what computes, kernels, device, cores, the
quota of processor time). Weights are no part of it: their values do not change the time.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

_MAX_AGE_S = 30 * 24 * 3600.0
"""Dust, a new power supply, another neighbour on a shared host: no machine stays what it was."""


class ProfileBook:
    """Answers of one device, by what was asked.

    Args:
        path: the file; made with the first answer.
        machine: everything of this machine that decides its speed, as JSON values.
        max_answers: the oldest go where there are more.
        clock: seconds since the epoch.
    """

    def __init__(
        self,
        path: Path,
        machine: Mapping[str, Any],
        *,
        max_answers: int = 256,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._path = path
        self._machine = dict(machine)
        self._max_answers = max_answers
        self._clock = clock
        self._answers = self._read()

    def find(self, request: Mapping[str, Any]) -> dict[str, float] | None:
        """The timings that were measured for this request; None if they must be measured.

        A request for a fresh measurement has none, and one that is the first of its turns says that what was measured
        before is doubted: then everything is forgotten.
        """
        if request.get("is_fresh"):
            if not request.get("attempt"):
                self._answers.clear()
                self._write()
            return None
        answer = self._answers.get(self._key(request))
        return None if answer is None or self._is_old(answer) else dict(answer["timings"])

    def keep(self, request: Mapping[str, Any], timings: Mapping[str, float]) -> None:
        """Write an answer down; of several turns of one request the fastest seconds count, part by part."""
        key = self._key(request)
        earlier = self._answers.pop(key, None) if request.get("attempt") else None
        if earlier is not None:
            timings = {name: min(seconds, earlier["timings"].get(name, seconds)) for name, seconds in timings.items()}
        # As the last, because the first are the oldest.
        self._answers[key] = {"timings": dict(timings), "at_s": self._clock()}
        for oldest in list(self._answers)[: -self._max_answers]:
            del self._answers[oldest]
        self._write()

    def _key(self, request: Mapping[str, Any]) -> str:
        asked = {name: value for name, value in request.items() if name not in ("attempt", "is_fresh")}
        text = json.dumps([self._machine, asked], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def _is_old(self, answer: Mapping[str, Any]) -> bool:
        # An answer from the future was written before the clock was set.
        return not 0 <= self._clock() - answer["at_s"] < _MAX_AGE_S

    def _read(self) -> dict[str, dict[str, Any]]:
        try:
            found = json.loads(self._path.read_text(encoding="utf-8"))
            return {
                str(key): {"timings": {str(n): float(s) for n, s in one["timings"].items()}, "at_s": float(one["at_s"])}
                for key, one in found.items()
            }
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            logger.warning("%s cannot be read and is begun anew: %s", self._path, error)
            return {}

    def _write(self) -> None:
        part = self._path.with_suffix(".part")
        try:
            part.write_text(json.dumps(self._answers), encoding="utf-8")
            os.replace(part, self._path)
        except OSError as error:
            # Costs the next job a measurement, and this one nothing.
            logger.warning("measured seconds are not kept: %s", error)
