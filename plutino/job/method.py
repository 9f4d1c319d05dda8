"""How the adapter is parametrised. Field names are those of peft."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from plutino.job.base import SpecPart


class LoraConfig(SpecPart):
    """LoRA (Hu et al. 2021, arXiv:2106.09685)."""

    type: Literal["lora"] = "lora"
    rank: int = Field(8, ge=1, le=4096)
    """Inner dimension R of the update B @ A."""
    alpha: float = Field(16.0, gt=0)
    """The update is scaled by alpha / rank (alpha / sqrt(rank) with rslora)."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout on the input of A, drawn from (seed, step, micro-batch, name) so that no partition changes it."""
    target_modules: Literal["all-linear"] | tuple[str, ...] = "all-linear"
    """Linear layers that get an adapter: names as in the model (q_proj, c_attn, ...), or all of them but the head."""
    layers_to_transform: tuple[int, ...] | None = None
    """Blocks that get an adapter; None means all."""
    rank_pattern: dict[str, int] = Field(default_factory=dict)
    """Another rank for modules whose name matches the key (a regular expression, as in peft)."""
    alpha_pattern: dict[str, float] = Field(default_factory=dict)
    """Another alpha for modules whose name matches the key."""
    use_rslora: bool = False
    """Scale by alpha / sqrt(rank) (Kalajdzievski 2023, arXiv:2312.03732)."""
    use_dora: bool = False
    """Weight-decomposed LoRA (Liu et al. 2024, arXiv:2402.09353)."""
    modules_to_save: tuple[str, ...] = ()
    """Modules outside the blocks trained in full beside LoRA and saved with it: lm_head, embed_tokens (wte)."""
    ensure_weight_tying: bool = False
    """With modules_to_save on a model with tied embeddings: keep head and embedding one parameter, as in peft."""


MethodConfig = LoraConfig
"""Union of all methods' configs, told apart by ``type``."""
