"""Bytes that one micro-batch keeps for its backward pass, block by block, from first principles.

What autograd saves in a transformers block (sdpa attention) under LoRA on a frozen base:

- A frozen linear saves nothing: its input would only serve the gradient of its weight. A LoRA linear saves its input
  and the output of A, in the compute dtype. Linears that read the same tensor share one copy, and attention's output is
  saved already; dropout makes a copy of its own. DoRA computes in fp32: on a bf16 base each linear casts its own copy.
- Norms save their input (llama's RMSNorm casts it to fp32 first) and their statistics.
- Attention saves q, k, v, its output, the log-sum-exp, and in every block its own copy of the padding mask in the
  compute dtype. A mask makes sdpa repeat k and v to all heads.
- Gates and activations save their factors: llama's SwiGLU gate, its silu and up; gpt2's tanh GELU four tensors.

Every function returns what the worst micro-batch of the job needs: all rows padded to the longest. Measured with
``torch.autograd.graph.saved_tensors_hooks`` the formulas are exact to the byte (torch 2.13, transformers 5.23,
peft 0.21) but for the lowest trainable block, which keeps a little less.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from partitioner.model import JobShape, LinearShape, ModelTable

_FP32_BYTES = 4


@dataclass(frozen=True, slots=True)
class _FamilyRule:
    """What a family's block keeps, beside LoRA's own tensors."""

    norm_bytes: Callable[[int, int], int]
    """(hidden size, compute bytes) -> bytes a token that both norms keep."""
    mlp_tensors: int
    """Tensors of intermediate size that the activation keeps."""
    dora_keeps_weights: bool
    """On an fp32 base DoRA's backward pass keeps a copy of the frozen weight: it is stored transposed."""
    input_of: Mapping[str, str]
    """Linear -> the tensor it reads; linears with the same one share a saved copy where no cast is made."""


_ATTENTION_OUTPUT = "attention output"

_RULES: Mapping[str, _FamilyRule] = {
    "llama": _FamilyRule(
        # The normalised input in fp32, and one reciprocal root mean square.
        norm_bytes=lambda hidden_size, compute_bytes: 2 * _FP32_BYTES * (hidden_size + 1),
        mlp_tensors=3,
        dora_keeps_weights=False,
        input_of={
            "self_attn.q_proj": "attention input",
            "self_attn.k_proj": "attention input",
            "self_attn.v_proj": "attention input",
            "self_attn.o_proj": _ATTENTION_OUTPUT,
            "mlp.gate_proj": "mlp input",
            "mlp.up_proj": "mlp input",
            "mlp.down_proj": "mlp inner",
        },
    ),
    "gpt2": _FamilyRule(
        # LayerNorm: its input, mean and reciprocal standard deviation.
        norm_bytes=lambda hidden_size, compute_bytes: 2 * compute_bytes * (hidden_size + 2),
        mlp_tensors=4,
        dora_keeps_weights=True,
        input_of={
            "attn.c_attn": "attention input",
            "attn.c_proj": _ATTENTION_OUTPUT,
            "mlp.c_fc": "mlp input",
            "mlp.c_proj": "mlp inner",
        },
    ),
}


def saved_block_bytes(table: ModelTable, shape: JobShape, block: int) -> int:
    """Bytes that one block keeps of one micro-batch until its backward pass, without checkpointing.

    Zero below the first trainable block, where the forward pass runs without autograd.
    """
    if block < shape.first_trainable_block:
        return 0
    saved_bytes = micro_batch_tokens(shape) * block_token_bytes(table, shape, block, shape.row_tokens)
    if shape.use_dora and shape.dtype == "fp32" and _RULES[table.family].dora_keeps_weights:
        adapted = adapted_linears(table, shape, block)
        saved_bytes += _FP32_BYTES * sum(linear.in_features * linear.out_features for linear in adapted)
    return saved_bytes


def block_token_bytes(table: ModelTable, shape: JobShape, block: int, row_tokens: int) -> int:
    """Bytes a token that one block keeps in rows of ``row_tokens``; no pass without autograd holds more at once."""
    rule = _RULES[table.family]
    compute_bytes = shape.dtype_bytes
    query_size = table.num_heads * table.head_dim
    token_bytes = rule.norm_bytes(table.hidden_size, compute_bytes)
    token_bytes += compute_bytes * (4 * query_size + row_tokens) + _FP32_BYTES * table.num_heads
    token_bytes += compute_bytes * rule.mlp_tensors * table.intermediate_size
    token_bytes += _lora_token_bytes(shape, rule, adapted_linears(table, shape, block))
    if shape.adapter_params[block]:
        token_bytes += _lora_compute_bytes(shape) * _rank_sum(shape, block)
    return token_bytes


def boundary_bytes(table: ModelTable, shape: JobShape) -> int:
    """Bytes of the hidden states of one micro-batch in the compute dtype."""
    return micro_batch_tokens(shape) * table.hidden_size * shape.dtype_bytes


def shared_bytes(table: ModelTable, shape: JobShape) -> int:
    """Bytes that all blocks of a stage keep together of one micro-batch: rotary angles, positions and the mask."""
    rotary_bytes = 2 * table.head_dim * shape.dtype_bytes
    position_and_mask_bytes = 2 * 8 + shape.row_tokens
    return micro_batch_tokens(shape) * (rotary_bytes + position_and_mask_bytes)


def head_bytes(table: ModelTable, shape: JobShape) -> int:
    """Bytes of final norm, logits and loss of one micro-batch at their peak, in the backward pass.

    Log-softmax, its incoming and its outgoing gradient stand side by side in fp32; logits exist for label tokens only.
    """
    norm_bytes = micro_batch_tokens(shape) * _FP32_BYTES * (table.hidden_size + 1)
    logit_bytes = shape.label_tokens * table.vocab_size * 3 * _FP32_BYTES
    return norm_bytes + logit_bytes + shape.label_tokens * table.hidden_size * (_FP32_BYTES + shape.dtype_bytes)


def workspace_bytes(table: ModelTable, shape: JobShape) -> int:
    """Bytes of the largest temporaries inside one block's forward or backward pass.

    The backward pass of the MLP holds two gradients of its inner tensor, that of attention those of q, k, v and of the
    block's input, and norms compute in fp32; whichever is largest. The factors are the smallest that covered every peak
    measured with torch's memory profiler over widths D and F from F = D / 4 to F = 8 D.
    """
    inner, hidden = table.intermediate_size, table.hidden_size
    if shape.use_dora and shape.dtype == "bf16":
        # Its share is fp32, with casts beside it.
        token_bytes = max(8 * inner + 8 * hidden, 24 * hidden)
    elif shape.dtype == "fp32":
        token_bytes = max(8 * inner, 17 * hidden)
    else:
        token_bytes = max(3 * inner, 15 * hidden)
    total_bytes = token_bytes * micro_batch_tokens(shape)
    if shape.use_dora:
        # DoRA forms the whole update B @ A from an identity matrix, in fp32, to take the norm of its columns.
        total_bytes += _FP32_BYTES * max(
            linear.in_features * (linear.in_features + 3 * linear.out_features)
            for linears in table.block_linears
            for linear in linears
        )
    return total_bytes


def micro_batch_tokens(shape: JobShape) -> int:
    """Tokens of the largest micro-batch, padding included."""
    return shape.micro_batch_rows * shape.row_tokens


def adapted_linears(table: ModelTable, shape: JobShape, block: int) -> tuple[LinearShape, ...]:
    """The linears of a block that carry an adapter."""
    if not shape.adapter_params[block]:
        return ()
    linears = table.block_linears[block]
    if not shape.adapted_linears:
        return linears
    return tuple(linear for linear in linears if linear.name in shape.adapted_linears[block])


def _lora_compute_bytes(shape: JobShape) -> int:
    return _FP32_BYTES if shape.use_dora else shape.dtype_bytes


def _rank_sum(shape: JobShape, block: int) -> int:
    return shape.adapter_rank_out[block] if shape.adapter_rank_out else 0


def _lora_token_bytes(shape: JobShape, rule: _FamilyRule, adapted: tuple[LinearShape, ...]) -> int:
    token_bytes = 0
    shared: set[str] = {_ATTENTION_OUTPUT}
    for linear in adapted:
        source = rule.input_of[linear.name]
        has_own_copy = (shape.use_dora and shape.dtype == "bf16") or shape.has_dropout
        if has_own_copy or source not in shared:
            token_bytes += _lora_compute_bytes(shape) * linear.in_features
            shared.add(source)
        if shape.has_dropout:
            token_bytes += linear.in_features  # the mask, one byte an element
        if shape.use_dora:
            # The frozen linear's output and LoRA's, both factors of the magnitude.
            token_bytes += (shape.dtype_bytes + _FP32_BYTES) * linear.out_features
    return token_bytes
