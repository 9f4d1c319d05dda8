"""What the job optimises."""

from __future__ import annotations

from typing import Literal

from plutino.job.base import SpecPart


class SftConfig(SpecPart):
    """Supervised fine-tuning: cross-entropy on the answer's tokens."""

    type: Literal["sft"] = "sft"
    train_on: Literal["answers", "all"] = "answers"
    """answers: only what the assistant (the completion) says carries loss. all: every token does."""


ObjectiveConfig = SftConfig
"""Union of all objectives' configs, told apart by ``type``."""
