"""Shares of parameters that the methods' papers name, counted: ``python -m benchmarks.method_shares``.

Models are transformers' own classes on the meta device, with the sizes of published ones and no weights. Each count is
the planner's, which plans and sweeps tell people; where stock peft has the method, it is held against peft's as well.
"""

from __future__ import annotations

import functools
import json
import math
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import peft
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.measure import RESULTS_DIR, write_results
from coordinator.demo.reference import peft_config_of
from partitioner.adapter import adapter_params_of
from partitioner.model import describe_model
from plutino.errors import ConfigError
from plutino.families import family_of
from plutino.job.spec import JobSpec

MODELS: Mapping[str, Mapping[str, Any]] = {
    # OPT's architecture is GPT-3's, with queries, keys and values in layers of their own.
    "GPT-3 175B": {
        "model_type": "opt",
        "hidden_size": 12288,
        "word_embed_proj_dim": 12288,
        "ffn_dim": 49152,
        "num_hidden_layers": 96,
        "num_attention_heads": 96,
        "vocab_size": 50272,
    },
    "OPT 1.3B": {
        "model_type": "opt",
        "hidden_size": 2048,
        "word_embed_proj_dim": 2048,
        "ffn_dim": 8192,
        "num_hidden_layers": 24,
        "num_attention_heads": 32,
        "vocab_size": 50272,
    },
    "GPT-2 medium": {"model_type": "gpt2", "n_embd": 1024, "n_layer": 24, "n_head": 16},
    "LLaMA 7B": {"model_type": "llama"},
}
"""Sizes of published models; what is not named is transformers' default, which for LLaMA is the 7B."""


@dataclass(frozen=True, slots=True)
class Claim:
    """What a paper says of a method's size."""

    paper: str
    says: str
    model: str
    method: Mapping[str, Any]
    at_least: float
    """As a share of the model's parameters."""
    at_most: float


_GPT3_LORA = {"type": "lora", "target_modules": ["q_proj", "v_proj"]}
CLAIMS = (
    Claim("LoRA", "10,000 times fewer, rank 4", "GPT-3 175B", {**_GPT3_LORA, "rank": 4}, 1e-4, 1.1e-4),
    Claim("LoRA", "4.7M, rank 1 (table 4)", "GPT-3 175B", {**_GPT3_LORA, "rank": 1}, 4.65e6 / 175e9, 4.75e6 / 174e9),
    Claim("LoRA", "37.7M, rank 8 (table 4)", "GPT-3 175B", {**_GPT3_LORA, "rank": 8}, 37.65e6 / 175e9, 37.75e6 / 174e9),
    Claim("QLoRA", "LoRA on all linear layers, rank 16: 40M", "LLaMA 7B", {"type": "lora", "rank": 16}, 5.8e-3, 6e-3),
    Claim(
        "Houlsby",
        "3.6 % a task; sizes 8 to 256",
        "GPT-2 medium",
        {"type": "adapters", "placement": "houlsby", "bottleneck": 128},
        3.4e-2,
        3.7e-2,
    ),
    Claim(
        "Pfeiffer",
        "half of Houlsby's",
        "GPT-2 medium",
        {"type": "adapters", "placement": "pfeiffer", "bottleneck": 128},
        1.7e-2,
        1.85e-2,
    ),
    Claim("Prefix-Tuning", "0.1 %, 250K", "GPT-2 medium", {"type": "prefix", "num_virtual_tokens": 5}, 6e-4, 1e-3),
    Claim("Prompt Tuning", "< 0.01 % above 1B", "OPT 1.3B", {"type": "prompt", "num_virtual_tokens": 20}, 0, 1e-4),
    Claim("Prompt Tuning", "< 0.01 % above 1B", "LLaMA 7B", {"type": "prompt", "num_virtual_tokens": 100}, 0, 1e-4),
    Claim("P-tuning v2", "0.1 to 3 %", "GPT-2 medium", {"type": "p_tuning_v2", "num_virtual_tokens": 100}, 1e-3, 3e-2),
    Claim("P-tuning v2", "0.1 to 3 %", "LLaMA 7B", {"type": "p_tuning_v2", "num_virtual_tokens": 128}, 1e-3, 3e-2),
    Claim(
        "PAC",
        "2.0 to 2.4 %, k = 8, on T5 and BART",
        "LLaMA 7B",
        {"type": "parallel_adapters", "reduction": 8},
        2e-2,
        3e-2,
    ),
)


@dataclass(frozen=True, slots=True)
class Count:
    """A claim beside what was counted."""

    claim: Claim
    model_params: int
    trained: int
    """As the planner counts."""
    peft_trained: int | None
    """As stock peft counts on the meta device; None: it has no such method."""

    @property
    def share(self) -> float:
        """Of the model's parameters."""
        return self.trained / self.model_params

    @property
    def holds(self) -> bool:
        """Whether the share is the paper's, and peft counts the same."""
        is_pefts = self.peft_trained in (None, self.trained)
        return is_pefts and self.claim.at_least <= self.share <= self.claim.at_most


def count(claim: Claim) -> Count:
    """Count what a claim is about."""
    base = _model(claim.model)
    config = base.config.to_dict()
    # A job that is never run: only its method is looked at.
    spec = JobSpec.model_validate({"model": {"path": "."}, "data": {"train": "."}, "method": claim.method})
    shapes = {name: tuple(tensor.shape) for name, tensor in base.state_dict().items()}
    table = describe_model(config, shapes, family_of(config["model_type"]))
    try:
        stock_config = peft_config_of(spec, table.num_blocks)
    except ConfigError:
        by_peft = None
    else:
        # A model of its own: peft changes what it is given.
        by_peft = peft.get_peft_model(_build(claim.model), stock_config).get_nb_trainable_parameters()[0]
    return Count(
        claim=claim,
        model_params=sum(math.prod(parameter.shape) for parameter in base.parameters()),
        trained=adapter_params_of(table, spec.method).num_params,
        peft_trained=by_peft,
    )


def _build(name: str) -> Any:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(**MODELS[name]), dtype=torch.float32)


_model = functools.lru_cache(maxsize=1)(_build)


def main() -> int:
    """Print and keep all claims; 0 if they hold."""
    found = [count(claim) for claim in CLAIMS]
    print(f"{'paper':<14} {'says':<42} {'model':<13} {'trained':>12} {'share':>9}  peft")
    for each in found:
        is_same = each.peft_trained == each.trained
        by_peft = "has none" if each.peft_trained is None else "the same" if is_same else f"{each.peft_trained:,}"
        claim = each.claim
        print(
            f"{claim.paper:<14} {claim.says:<42} {claim.model:<13} {each.trained:>12,} {each.share:>9.4%}"
            f"  {by_peft}{'' if each.holds else '  DIFFERS'}"
        )
    document = {"claims": [{**asdict(each), "share": each.share, "holds": each.holds} for each in found]}
    write_results(RESULTS_DIR / "method_shares.json", json.loads(json.dumps(document)))
    return 0 if all(each.holds for each in found) else 1


if __name__ == "__main__":
    sys.exit(main())
