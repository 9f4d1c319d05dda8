"""The job that every pipeline peer trains: LoRA on a random Llama, the same numbers in each of them."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """Sizes of model and batch. The defaults make 110 million parameters, and 2048 tokens a step."""

    num_blocks: int = 12
    hidden_dim: int = 768
    intermediate_dim: int = 2048
    num_heads: int = 12
    vocab_size: int = 16384
    seq_len_tokens: int = 256
    batch_size: int = 8
    num_micro_batches: int = 8
    lora_rank: int = 16
    lr: float = 1e-3
    seed: int = 0

    @property
    def tokens_per_step(self) -> int:
        """Tokens of one batch."""
        return self.batch_size * self.seq_len_tokens

    def to_json(self) -> str:
        """As a child process's argument."""
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> Workload:
        """Inverse of :meth:`to_json`."""
        return Workload(**json.loads(text))


END_TOKEN = 0
"""Ends every row, and is nowhere else in it."""


def build_base(workload: Workload, dtype: torch.dtype) -> LlamaForCausalLM:
    """The frozen model without adapters, with the weights of the workload's seed."""
    torch.manual_seed(workload.seed)
    config = LlamaConfig(
        vocab_size=workload.vocab_size,
        hidden_size=workload.hidden_dim,
        intermediate_size=workload.intermediate_dim,
        num_hidden_layers=workload.num_blocks,
        num_attention_heads=workload.num_heads,
        max_position_embeddings=workload.seq_len_tokens,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=END_TOKEN,
        pad_token_id=END_TOKEN,
    )
    base = LlamaForCausalLM(config)
    # On the modules: transformers' own `to` is not typed.
    torch.nn.Module.to(base, dtype)
    return base


def build_model(workload: Workload) -> PeftModel:
    """The whole model with adapters: base bf16, adapters fp32, equal in every process that calls this."""
    base = build_base(workload, torch.bfloat16)
    lora = LoraConfig(r=workload.lora_rank, lora_alpha=2 * workload.lora_rank, target_modules="all-linear")
    # peft keeps adapters in fp32 on a bf16 base (autocast_adapter_dtype).
    model = get_peft_model(base, lora)
    assert isinstance(model, PeftModel)
    return model


def batch(workload: Workload, step: int) -> Tensor:
    """Token ids [batch_size, seq_len_tokens] of a step; every row ends with END_TOKEN, as rows of fine-tuning do."""
    generator = torch.Generator().manual_seed(workload.seed + 1 + step)
    shape = (workload.batch_size, workload.seq_len_tokens)
    ids = torch.randint(END_TOKEN + 1, workload.vocab_size, shape, generator=generator)
    ids[:, -1] = END_TOKEN
    return ids


def trainable_parameters(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    """The adapters of a model or of a stage of it."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]
