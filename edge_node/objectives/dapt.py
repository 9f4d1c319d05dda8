"""Domain-adaptive pre-training (Gururangan et al. 2020, arXiv:2004.10964): cross-entropy on every token of raw text."""

from __future__ import annotations

from edge_node.objectives.label_tokens import LabelTokenLoss
from plutino.job.objective import DaptConfig


class DaptObjective(LabelTokenLoss):
    """Every token but a document's first, which nothing predicts, carries loss."""

    def __init__(self, config: DaptConfig) -> None:
        self.config = config
