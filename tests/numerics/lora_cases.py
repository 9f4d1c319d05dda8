"""LoRA jobs of every kind, on stages and under stock peft."""

from __future__ import annotations

from functools import reduce
from operator import or_

import peft
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from edge_node.methods.dropout import dropout_position
from edge_node.methods.lora import attach_lora
from plutino.job.method import LoraConfig
from tests.numerics.chain import run_chain

# Few targets where the case is not about targets: wrapping layers is most of these tests' time.
FEW = {"llama": ("q_proj", "mlp.down_proj"), "gpt2": ("c_attn", "mlp.c_proj")}


def make_configs(**few) -> dict[str, LoraConfig]:
    return {
        "few": LoraConfig(rank=4, **few),
        "all_linear": LoraConfig(rank=4),
        "dora": LoraConfig(rank=4, use_dora=True, **few),
        "dropout": LoraConfig(rank=4, dropout=0.3, **few),
        "dora_dropout": LoraConfig(rank=4, dropout=0.3, use_dora=True, **few),
        "rslora": LoraConfig(rank=4, use_rslora=True, **few),
        "blocks": LoraConfig(rank=4, blocks=(1, 3), **few),
        "head": LoraConfig(rank=4, modules_to_save=("lm_head",), **few),
        "tied": LoraConfig(rank=4, modules_to_save=("lm_head",), ensure_weight_tying=True, **few),
    }


LLAMA = make_configs(target_modules=FEW["llama"]) | {
    "patterns": LoraConfig(
        rank=4, rank_pattern={"down_proj": 2, r"layers\.[23]\..*_proj": 3}, alpha_pattern={"up_proj": 3.5}
    ),
    "all_linear_blocks": LoraConfig(rank=4, blocks=(2,)),
    "both": LoraConfig(rank=4, modules_to_save=("embed_tokens", "lm_head"), target_modules=FEW["llama"]),
    "tied_by_embedding": LoraConfig(
        rank=4, modules_to_save=("embed_tokens",), ensure_weight_tying=True, target_modules=FEW["llama"]
    ),
}
CONFIGS: dict[str, dict[str, LoraConfig]] = {
    "llama": LLAMA,
    "tied_llama": LLAMA,
    "gpt2": make_configs(target_modules=FEW["gpt2"])
    | {"embedding": LoraConfig(rank=4, modules_to_save=("wte",), target_modules=FEW["gpt2"])},
}
CASES = [
    *(("llama", name) for name in ("all_linear", "patterns", "blocks", "all_linear_blocks", "rslora", "dora", "both")),
    *(("tied_llama", name) for name in ("head", "tied", "tied_by_embedding")),
    *(("gpt2", name) for name in ("all_linear", "dora", "embedding", "tied")),
]


def attach(stages, config, seed=7):
    return [attach_lora(stage, config, seed=seed) for stage in stages]


def joined(methods):
    return reduce(or_, (method.state() for method in methods))


def randomised(state, seed=11):
    """Values away from the start, so that B is not zero; both keys of a tied parameter keep one value."""
    generator = torch.Generator().manual_seed(seed)
    moved = {
        name: value + 0.05 * torch.randn(value.shape, generator=generator) for name, value in sorted(state.items())
    }
    return moved


def tie(state, config):
    names = sorted(name for name in state if "lora" not in name)
    return state | dict.fromkeys(names, state[names[0]]) if config.ensure_weight_tying else state


def stock_model(model_dir, config: LoraConfig, dtype=torch.float32):
    """The whole model under stock peft, built from the job's settings and not from ours."""
    base = AutoModelForCausalLM.from_pretrained(model_dir, dtype=dtype)
    targets = config.target_modules if config.target_modules == "all-linear" else list(config.target_modules)
    if config.blocks and targets == "all-linear":
        # peft refuses to combine the two.
        targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    stock = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=config.rank,
        lora_alpha=config.alpha,
        target_modules=targets,
        layers_to_transform=list(config.blocks) if config.blocks else None,
        rank_pattern=dict(config.rank_pattern),
        alpha_pattern=dict(config.alpha_pattern),
        use_rslora=config.use_rslora,
        use_dora=config.use_dora,
        modules_to_save=list(config.modules_to_save) or None,
        ensure_weight_tying=config.ensure_weight_tying,
        fan_in_fan_out=base.config.model_type == "gpt2",
    )
    return peft.get_peft_model(base, stock).eval()


def loss_of(logits, batch):
    return cross_entropy(logits[:, :-1].flatten(0, 1).float(), batch.input_ids[:, 1:].flatten(), reduction="sum")


def chain_gradients(stages, methods, batch, position=None):
    if position is None:
        logits, finish = run_chain(stages, batch)
        loss_of(logits, batch).backward()
        finish()
    else:
        with dropout_position(**position):
            logits, finish = run_chain(stages, batch)
        loss_of(logits, batch).backward()
        finish()
    gradients = {}
    for parameter in (p for method in methods for p in method.parameters):
        for _, use in parameter.uses:
            assert use.grad is not None, parameter.name
            gradients[parameter.name] = gradients.get(parameter.name, 0) + use.grad
    return gradients
