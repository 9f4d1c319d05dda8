"""A bound on the processor time of processes, set and changed while they run: a cgroup of their own.

Needs root and the kernel's cpu controller, version 1 or 2, mounted where it usually is.
"""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Collection
from pathlib import Path
from types import TracebackType

_CGROUPS = Path("/sys/fs/cgroup")
PERIOD_US = 100_000
"""What containers are given."""
FINE_PERIOD_US = 10_000
"""For agents that stand for slow devices."""
FIRST_WEIGHT = 64
"""For those who are to get their quota before anything else computes, so that their seconds follow from it alone."""
SPARE_PROCESSORS = 0.3
"""For the coordinator and whoever measures, where agents are bounded by quotas instead of cores."""
_REMOVE_WITHIN_S = 5.0


def quota_refusal(cgroups: Path = _CGROUPS) -> str | None:
    """Why no quota can be set here; None: it can."""
    try:
        with ProcessorQuota(1.0, cgroups=cgroups):
            return None
    except OSError as error:
        return f"no cgroup with a quota of processor time can be made below {cgroups} ({error}); it needs root"


class ProcessorQuota:
    """A cgroup that is removed at the end of the ``with`` block; its processes must have ended by then.

    Args:
        cores: processor seconds that its processes may use in a second, all together.
        weight: times the share of another process that they get where processors are short. With a high one they get
            their quota whatever else runs, so that their seconds follow from it alone.
        period_us: in which the quota may be used up at once. The shorter, the more like a slower processor.
        cgroups: where the cgroups are.
    """

    def __init__(self, cores: float, *, weight: int = 1, period_us: int = PERIOD_US, cgroups: Path = _CGROUPS) -> None:
        self._is_v2 = (cgroups / "cgroup.controllers").is_file()
        self._folder = (cgroups if self._is_v2 else cgroups / "cpu") / f"plutino-{secrets.token_hex(4)}"
        self._cores = cores
        self._weight = weight
        self._period_us = period_us

    @property
    def folder(self) -> Path:
        """The cgroup's, for a process that puts itself into it."""
        return self._folder

    def __enter__(self) -> ProcessorQuota:
        """Make it.

        Raises:
            OSError: the kernel or the user's rights do not allow it.
        """
        if self._is_v2 and "cpu" not in (parent := self._folder.parent / "cgroup.subtree_control").read_text().split():
            parent.write_text("+cpu")
        self._folder.mkdir()
        try:
            self.set(self._cores)
            name, usual = ("cpu.weight", 100) if self._is_v2 else ("cpu.shares", 1024)
            (self._folder / name).write_text(str(usual * self._weight))
        except OSError:
            self._folder.rmdir()
            raise
        return self

    def set(self, cores: float) -> None:
        """Allow so many processors from now on."""
        quota = str(int(cores * self._period_us))
        if self._is_v2:
            (self._folder / "cpu.max").write_text(f"{quota} {self._period_us}")
        else:
            (self._folder / "cpu.cfs_period_us").write_text(str(self._period_us))
            (self._folder / "cpu.cfs_quota_us").write_text(quota)

    def take(self, pids: Collection[int]) -> None:
        """Put processes into it; what they start later comes along."""
        for pid in pids:
            (self._folder / "cgroup.procs").write_text(str(pid))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        deadline_s = time.monotonic() + _REMOVE_WITHIN_S
        while True:
            try:
                return os.rmdir(self._folder)
            except OSError:
                # The kernel still buries the last of its processes.
                if time.monotonic() > deadline_s:
                    raise
                time.sleep(0.05)
