"""All real runs, by name: each a function of its settings in one of the files beside this one."""

from __future__ import annotations

from collections.abc import Mapping

from benchmarks.objective_runs.preferences import DPO, REWARD
from benchmarks.objective_runs.run import Run, Settings

__all__ = ["RUNS", "Settings"]

RUNS: Mapping[str, Run] = {
    "reward": REWARD,
    "dpo": DPO,
}
