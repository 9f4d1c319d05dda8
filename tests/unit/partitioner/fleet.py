"""Small models, jobs and fleets with round numbers."""

from __future__ import annotations

from typing import Any

from partitioner.adapter import adapter_params_of
from partitioner.device import BlockTimings, DeviceProfile, LinkProfile, LinkTable
from partitioner.memory import stage_memory
from partitioner.model import ModelTable, describe_model
from partitioner.shape import JobShape
from plutino.families import family_of
from plutino.job.method import LoraConfig
from plutino.sizes import MIB

TIGHT = {"row_tokens": 512, "label_tokens": 400, "batch_rows": 16, "micro_batch_rows": 16}
"""Of a job that small devices hardly hold."""

SLOW_LAN = LinkTable(other=LinkProfile(bandwidth_bytes_per_s=2e6, latency_s=2e-3))


def llama_config(num_blocks: int = 4, **changes: Any) -> dict[str, Any]:
    config = {
        "model_type": "llama",
        "num_hidden_layers": num_blocks,
        "hidden_size": 64,
        "intermediate_size": 176,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 1000,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
    }
    return config | changes


def llama_tensors(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    hidden, inner, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    key = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    tensors = {"model.embed_tokens.weight": (vocab, hidden), "model.norm.weight": (hidden,)}
    if not config["tie_word_embeddings"]:
        tensors["lm_head.weight"] = (vocab, hidden)
    for block in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{block}."
        tensors |= {
            f"{prefix}self_attn.q_proj.weight": (hidden, hidden),
            f"{prefix}self_attn.k_proj.weight": (key, hidden),
            f"{prefix}self_attn.v_proj.weight": (key, hidden),
            f"{prefix}self_attn.o_proj.weight": (hidden, hidden),
            f"{prefix}mlp.gate_proj.weight": (inner, hidden),
            f"{prefix}mlp.up_proj.weight": (inner, hidden),
            f"{prefix}mlp.down_proj.weight": (hidden, inner),
            f"{prefix}input_layernorm.weight": (hidden,),
            f"{prefix}post_attention_layernorm.weight": (hidden,),
        }
    return tensors


def gpt2_config(num_blocks: int = 3) -> dict[str, Any]:
    return {
        "model_type": "gpt2",
        "n_layer": num_blocks,
        "n_embd": 48,
        "n_head": 4,
        "n_positions": 128,
        "vocab_size": 500,
    }


def gpt2_tensors(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    hidden = config["n_embd"]
    tensors = {
        "transformer.wte.weight": (config["vocab_size"], hidden),
        "transformer.wpe.weight": (config["n_positions"], hidden),
        "transformer.ln_f.weight": (hidden,),
        "transformer.ln_f.bias": (hidden,),
    }
    linears = {
        "attn.c_attn": (hidden, 3 * hidden),
        "attn.c_proj": (hidden, hidden),
        "mlp.c_fc": (hidden, 4 * hidden),
        "mlp.c_proj": (4 * hidden, hidden),
    }
    for block in range(config["n_layer"]):
        prefix = f"transformer.h.{block}."
        tensors[f"{prefix}attn.bias"] = (1, 1, 128, 128)  # a buffer that old checkpoints carry
        for norm in ("ln_1", "ln_2"):
            tensors[f"{prefix}{norm}.weight"] = tensors[f"{prefix}{norm}.bias"] = (hidden,)
        for name, shape in linears.items():
            tensors[f"{prefix}{name}.weight"], tensors[f"{prefix}{name}.bias"] = shape, shape[1:]
    return tensors


def llama(num_blocks: int = 4, **changes: Any) -> ModelTable:
    config = llama_config(num_blocks, **changes)
    return describe_model(config, llama_tensors(config), family_of("llama"))


def gpt2(num_blocks: int = 3) -> ModelTable:
    config = gpt2_config(num_blocks)
    return describe_model(config, gpt2_tensors(config), family_of("gpt2"))


def t5(num_blocks: int = 6) -> ModelTable:
    """As many blocks in the encoder as in the decoder."""
    hidden, inner, vocab = 64, 128, 1000
    config = {
        "model_type": "t5",
        "num_layers": num_blocks // 2,
        "d_model": hidden,
        "d_ff": inner,
        "num_heads": 4,
        "d_kv": 16,
        "vocab_size": vocab,
    }
    tensors: dict[str, tuple[int, ...]] = {"shared.weight": (vocab, hidden)}
    for half, attentions in (("encoder", ("SelfAttention",)), ("decoder", ("SelfAttention", "EncDecAttention"))):
        tensors[f"{half}.final_layer_norm.weight"] = (hidden,)
        for block in range(num_blocks // 2):
            prefix = f"{half}.block.{block}.layer."
            for layer, attention in enumerate(attentions):
                tensors |= {f"{prefix}{layer}.{attention}.{name}.weight": (hidden, hidden) for name in "qkvo"}
            mlp = f"{prefix}{len(attentions)}.DenseReluDense"
            tensors |= {f"{mlp}.wi.weight": (inner, hidden), f"{mlp}.wo.weight": (hidden, inner)}
            norms = range(len(attentions) + 1)
            tensors |= {f"{prefix}{layer}.layer_norm.weight": (hidden,) for layer in norms}
        tensors[f"{half}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"] = (32, 4)
    return describe_model(config, tensors, family_of("t5"))


def job(table: ModelTable, method: LoraConfig | None = None, **changes: Any) -> JobShape:
    fields: dict[str, Any] = {
        "dtype": "fp32",
        "batch_rows": 8,
        "micro_batch_rows": 2,
        "row_tokens": 64,
        "label_tokens": 40,
        **adapter_params_of(table, method or LoraConfig()).shape_fields,
    }
    return JobShape(**(fields | changes))


def device(
    name: str, *, speed: float = 1.0, available_mib: int = 4000, host: str | None = None, **changes: Any
) -> DeviceProfile:
    fields: dict[str, Any] = {
        "agent_id": f"id-{name}",
        "name": name,
        "host_id": host or name,
        "threads": 2,
        "available_bytes": available_mib * MIB,
        "baseline_bytes": 300 * MIB,
        "timings": BlockTimings(
            forward_s=0.010 / speed,
            backward_s=0.022 / speed,
            embedding_s=0.001 / speed,
            head_forward_s=0.004 / speed,
            head_backward_s=0.007 / speed,
        ),
        "dtypes": ("fp32", "bf16"),
    }
    return DeviceProfile(**(fields | changes))


def tight_device(table: ModelTable, shape: JobShape, *, checkpointing: bool) -> DeviceProfile:
    """A device that holds the whole job with less than 1 MiB to spare."""
    whole = {"start_block": 0, "end_block": table.num_blocks, "num_stages": 1, "stage_index": 0}
    items = stage_memory(table, shape, checkpointing=checkpointing, **whole)
    return device("tight", available_mib=300 + sum(item.bytes for item in items) // MIB + 1)
