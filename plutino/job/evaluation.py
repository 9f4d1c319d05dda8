"""What else the job measures of the model, beside its own held-out rows."""

from __future__ import annotations

from typing import Literal

from plutino.job.base import SpecPart


class EvaluationConfig(SpecPart):
    """Perplexity on general text before and after training: what fine-tuning cost in ability."""

    general: str | None = None
    """UTF-8 text file. A relative path is taken from the job file's folder. None: the text that ships with plutino."""
    measure_general: Literal["auto", "always", "never"] = "auto"
    """auto: where the job's answers are scored, and its objective keeps the model a language model."""
