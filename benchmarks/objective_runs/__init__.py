"""All real runs, by name: each a function of its settings in one of the files beside this one."""

from __future__ import annotations

from collections.abc import Mapping

from benchmarks.objective_runs.loops import LLM2LLM
from benchmarks.objective_runs.mixtures import MULTITASK
from benchmarks.objective_runs.preferences import DPO, REWARD
from benchmarks.objective_runs.raw_text import DAPT_LEGAL, DAPT_MEDICAL
from benchmarks.objective_runs.run import Run, Settings
from benchmarks.objective_runs.sampling import GRPO
from benchmarks.objective_runs.shipped import SHIPPED

__all__ = ["RUNS", "Settings"]

RUNS: Mapping[str, Run] = {
    "reward": REWARD,
    "dpo": DPO,
    "grpo": GRPO,
    "dapt_legal": DAPT_LEGAL,
    "dapt_medical": DAPT_MEDICAL,
    **MULTITASK,
    "llm2llm": LLM2LLM,
    **SHIPPED,
}
