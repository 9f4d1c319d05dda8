"""All objectives, by the ``type`` of their config."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from edge_node.objectives.base import Objective
from edge_node.objectives.classification import ClassificationObjective
from edge_node.objectives.dapt import DaptObjective
from edge_node.objectives.dpo import DpoObjective
from edge_node.objectives.grpo import GrpoObjective
from edge_node.objectives.regression import RegressionObjective
from edge_node.objectives.reward import RewardObjective
from edge_node.objectives.seq2seq import Seq2SeqObjective
from edge_node.objectives.sft import SftObjective

OBJECTIVES: Mapping[str, Callable[[Any], Objective]] = {
    "classification": ClassificationObjective,
    "dapt": DaptObjective,
    "dpo": DpoObjective,
    "grpo": GrpoObjective,
    "regression": RegressionObjective,
    "reward": RewardObjective,
    "seq2seq": Seq2SeqObjective,
    "sft": SftObjective,
}
"""Each is made from the config that has its ``type``."""
