"""Random models, jobs and fleets for the planner's benchmark: by seed, of round figures."""

from __future__ import annotations

import random
from collections.abc import Sequence

from partitioner.device import BlockTimings, DeviceProfile, LinkProfile, LinkTable, MeasuredLink
from partitioner.memory import MemoryModel
from partitioner.model import ModelTable, describe_model
from partitioner.shape import JobShape
from plutino.families import family_of
from plutino.sizes import MIB

GIGABIT = LinkProfile(bandwidth_bytes_per_s=125e6, latency_s=3e-4)
FAST_ETHERNET = LinkProfile(bandwidth_bytes_per_s=12.5e6, latency_s=5e-4)
_BASELINE_BYTES = 350 * MIB
_FLOPS = 4e11
"""Of a device of speed 1, as it computes: a small board."""


def llama_table(num_blocks: int, hidden: int, *, vocab: int = 32_000) -> ModelTable:
    """A Llama of the usual proportions."""
    inner, heads = hidden * 11 // 4, hidden // 64
    config = {
        "model_type": "llama",
        "num_hidden_layers": num_blocks,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "vocab_size": vocab,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
        "hidden_act": "silu",
    }
    block = {
        "self_attn.q_proj.weight": (hidden, hidden),
        "self_attn.k_proj.weight": (hidden, hidden),
        "self_attn.v_proj.weight": (hidden, hidden),
        "self_attn.o_proj.weight": (hidden, hidden),
        "mlp.gate_proj.weight": (inner, hidden),
        "mlp.up_proj.weight": (inner, hidden),
        "mlp.down_proj.weight": (hidden, inner),
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
    }
    tensors: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (vocab, hidden),
        "model.norm.weight": (hidden,),
        "lm_head.weight": (vocab, hidden),
    }
    for index in range(num_blocks):
        tensors |= {f"model.layers.{index}.{name}": shape for name, shape in block.items()}
    return describe_model(config, tensors, family_of("llama"))


def lora_job(table: ModelTable, *, batch_rows: int, micro_batch_rows: int, row_tokens: int, rank: int = 8) -> JobShape:
    """LoRA on every linear layer."""
    params = tuple(
        rank * sum(linear.in_features + linear.out_features for linear in linears) for linears in table.block_linears
    )
    return JobShape(
        dtype="fp32",
        batch_rows=batch_rows,
        micro_batch_rows=micro_batch_rows,
        row_tokens=row_tokens,
        label_tokens=micro_batch_rows * row_tokens // 4,
        adapter_params=params,
        adapter_rank_out=tuple(rank * len(linears) for linears in table.block_linears),
    )


def device_of(name: str, speed: float, room_bytes: int, table: ModelTable, shape: JobShape) -> DeviceProfile:
    """A device whose seconds follow from the model's operations; its backward pass takes 1.1 forward passes."""
    tokens = shape.micro_batch_rows * shape.row_tokens
    forward_s = 2 * table.block_params[0] * tokens / (_FLOPS * speed)
    head_s = 2 * table.head_params * shape.label_tokens / (_FLOPS * speed)
    return DeviceProfile(
        agent_id=f"id-{name}",
        name=name,
        host_id=name,
        threads=4,
        available_bytes=_BASELINE_BYTES + room_bytes,
        baseline_bytes=_BASELINE_BYTES,
        timings=BlockTimings(
            forward_s=forward_s,
            backward_s=1.1 * forward_s,
            embedding_s=0.02 * forward_s,
            head_forward_s=head_s,
            head_backward_s=head_s,
        ),
        dtypes=("fp32",),
    )


def random_fleet(
    generator: random.Random,
    table: ModelTable,
    shape: JobShape,
    num_devices: int,
    *,
    tightness: Sequence[float] = (1.2, 2.0, 4.0),
) -> tuple[list[DeviceProfile], LinkTable]:
    """Devices of speed 4, 2 or 1, each with room for its share of the job times one of ``tightness``.

    Links are of 1000 or 100 Mbit/s, pair by pair.
    """
    memory = MemoryModel(table, shape)
    whole = memory.job_bytes(0, table.num_blocks, num_stages=1, stage_index=0, checkpointing=False)
    devices = [
        device_of(
            f"d{i}",
            generator.choice([1.0, 2.0, 4.0]),
            int(whole / num_devices * generator.choice(list(tightness))),
            table,
            shape,
        )
        for i in range(num_devices)
    ]
    return devices, random_links(generator, devices)


def random_links(generator: random.Random, devices: Sequence[DeviceProfile]) -> LinkTable:
    """A gigabit or a tenth of it between every two devices."""
    return LinkTable(
        measured=tuple(
            MeasuredLink(
                agent_ids=(devices[i].agent_id, devices[j].agent_id),
                link=generator.choice([GIGABIT, FAST_ETHERNET]),
            )
            for i in range(len(devices))
            for j in range(i)
        ),
        other=GIGABIT,
    )
