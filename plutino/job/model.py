"""Which base model a job fine-tunes, and how its frozen weights are held."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from plutino.job.base import SpecPart

Scheme = Literal["none", "int8", "nf4", "int4", "gptq"]
"""How the blocks' linear layers are held; ``none`` keeps them in the compute dtype."""

Outer = Literal["keep", "int8"]
"""How the embedding or the head is held: in the compute dtype, or one byte a weight and one scale a word."""


Products = Literal["dequantised", "integer"]
"""How int8 layers multiply: by the dequantised weight, or integers by integers, for which every token's activations are
rounded to int8 as well. That has no gradient."""


class ModelConfig(SpecPart):
    """The frozen base model."""

    path: str
    """Folder with config.json, safetensors and the tokenizer; a relative path is taken from the job file's folder. Or a
    model on the hub, organisation/name[@revision], where there is no folder of that name."""
    dtype: str = Field("auto", pattern="^(auto|fp32|bf16)$")
    """Compute dtype of the frozen layers: fp32, bf16, or auto (bf16 where every device runs it faster,
    or where the job fits in nothing else)."""
    quantization: Scheme | Literal["auto"] = "none"
    """How the blocks' linear layers are held: none (in the compute dtype), int8 (8 bits), nf4 (4.13 bits, QLoRA), int4
    (groups of 128), gptq (as a GPTQ checkpoint stores them), or auto (the least lossy that fits the devices)."""
    quantize_embedding: Outer = "keep"
    """keep the token embedding in the compute dtype, or hold it in int8."""
    quantize_head: Outer = "keep"
    """keep the output head in the compute dtype, or hold it in int8."""
    integer_products: Literal["auto", "never"] = "auto"
    """How int8 layers multiply where a method leaves the blocks alone (parallel_adapters): auto multiplies integers
    where the devices are faster with that, which they measure before step 0; never keeps to dequantised weights."""
    packed_by: Literal["devices", "coordinator"] = "devices"
    """Who quantises: each device what it gets of the model, or the coordinator all of it, once, so that devices get the
    packed tensors: a quarter of bf16's bytes in 4 bits, the same bits."""


class Packing(SpecPart):
    """How a job's frozen weights are held, once it is chosen."""

    scheme: Scheme = "none"
    embedding: Outer = "keep"
    head: Outer = "keep"
    products: Products = "dequantised"
    """Of the blocks' layers; the head always multiplies by the dequantised weight."""

    @property
    def is_plain(self) -> bool:
        """Nothing is quantised."""
        return self == PLAIN


PLAIN = Packing()
"""Nothing is quantised."""


def packing_of(config: ModelConfig, scheme: Scheme) -> Packing:
    """What a job's model settings come to with a scheme chosen."""
    return Packing(scheme=scheme, embedding=config.quantize_embedding, head=config.quantize_head)
