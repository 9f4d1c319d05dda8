"""Which base model a job fine-tunes."""

from __future__ import annotations

from pydantic import Field

from plutino.job.base import SpecPart


class ModelConfig(SpecPart):
    """The frozen base model."""

    path: str
    """Folder with config.json, safetensors and the tokenizer. A relative path is taken from the job file's folder."""
    dtype: str = Field("auto", pattern="^(auto|fp32|bf16)$")
    """Compute dtype of the frozen layers: fp32, bf16, or auto (the fastest that every chosen device runs well)."""
