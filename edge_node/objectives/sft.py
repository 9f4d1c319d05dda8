"""Supervised fine-tuning: cross-entropy on the tokens that carry loss."""

from __future__ import annotations

from edge_node.objectives.label_tokens import LabelTokenLoss
from plutino.job.objective import SftConfig


class SftObjective(LabelTokenLoss):
    """Which tokens carry loss was decided where the rows were tokenised."""

    def __init__(self, config: SftConfig | None = None) -> None:
        self.config = config or SftConfig()
