"""Bytes that one micro-batch keeps for its backward pass, block by block, from first principles.

What autograd saves in a transformers block under LoRA on a frozen base:

- A frozen linear saves nothing: its input would only serve the gradient of its weight. A LoRA linear saves its input
  and the output of A, in the compute dtype. Linears that read the same tensor share one copy, and attention's output is
  saved already; dropout makes a copy of its own. DoRA computes in fp32: on a bf16 base each linear casts its own copy.
- Norms save their input (llama's RMSNorm casts it to fp32 first) and their statistics.
- Attention saves q, k, v, its output, the log-sum-exp, and in every block its own copy of the padding mask in the
  compute dtype. A mask makes sdpa repeat k and v to all heads. Eager attention saves its probabilities, a number for
  every pair of tokens and head.
- Gates and activations save their factors: llama's SwiGLU gate, its silu and up; gpt2's tanh GELU four tensors. Experts
  save the same for every expert that a token is sent to.

Every function returns what the worst micro-batch of the job needs: all rows padded to the longest. Measured with
``torch.autograd.graph.saved_tensors_hooks`` (torch 2.13, transformers 5.23, peft 0.21) the formulas are exact to the
byte for most families and up to a third too high where a saved tensor serves twice (relu, norms that parallel parts of
a block share); the lowest trainable block keeps a little less.
"""

from __future__ import annotations

from dataclasses import replace

from partitioner.model import LinearShape, ModelTable
from partitioner.shape import JobShape
from partitioner.token_bytes import attention_token_bytes, keeps_scores, mlp_token_bytes, norm_token_bytes
from plutino.families import ATTENTION_OUTPUT, Family, family_of
from plutino.family import ENCODER_OUTPUT
from plutino.sizes import SMALLEST_MAPPING_BYTES

_FP32_BYTES = 4


def saved_block_bytes(table: ModelTable, shape: JobShape, block: int) -> int:
    """Bytes that one block keeps of one micro-batch until its backward pass, without checkpointing.

    Zero below the first trainable block, where the forward pass runs without autograd.
    """
    if block < shape.first_trainable_block:
        return 0
    if shape.side_reduction:
        return _side_block_bytes(table, shape, block) if shape.adapter_params[block] else 0
    if table.num_encoder_blocks and block >= table.num_encoder_blocks:
        return _decoder_block_bytes(table, shape, block)
    seen_tokens = shape.row_tokens + shape.past_tokens
    saved_bytes = micro_batch_tokens(shape) * block_token_bytes(table, shape, block, seen_tokens)
    family = family_of(table.family)
    saved_bytes += _past_bytes(table, shape, family) + _trained_biases_bytes(table, shape, shape.row_tokens)
    if shape.adapter_kept_numbers:
        saved_bytes += _FP32_BYTES * shape.adapter_kept_numbers[block]
    if block == table.num_encoder_blocks - 1 and family.norm == "rms":
        # The norm behind an encoder.
        saved_bytes += micro_batch_tokens(shape) * _FP32_BYTES * (table.hidden_size + 1)
    if shape.dtype_bytes < _FP32_BYTES and shape.adapter_cast_params:
        saved_bytes += shape.dtype_bytes * shape.adapter_cast_params[block]
    if family.norm_adds_one:
        qk_size = 2 * table.head_dim if family.qk_norm == "head" else 0
        saved_bytes += _FP32_BYTES * (family.num_norms * table.hidden_size + qk_size)
    if shape.use_dora and shape.dtype == "fp32" and family.has_conv1d:
        # DoRA's backward pass keeps a copy of a frozen weight that is stored transposed.
        adapted = adapted_linears(table, shape, block)
        saved_bytes += _FP32_BYTES * sum(linear.in_features * linear.out_features for linear in adapted)
    return saved_bytes


def block_kinds(table: ModelTable, shape: JobShape) -> list[int]:
    """For every block the first one that keeps, holds and trains the same as it: what is worked out once serves all."""
    per_block = (shape.adapter_rank_out, shape.adapter_cast_params, shape.adapted_linears, shape.adapter_kept_numbers)
    lowest = shape.first_trainable_block
    first_of: dict[object, int] = {}
    kinds = []
    for block in range(table.num_blocks):
        key = (
            block < lowest,
            bool(shape.side_reduction) and block in (lowest, table.num_encoder_blocks),
            block >= table.num_encoder_blocks,
            block in table.expert_blocks,
            table.block_params[block],
            shape.adapter_params[block],
            *(values[block] if values else None for values in per_block),
            *((linear.name, linear.in_features, linear.out_features) for linear in table.block_linears[block]),
        )
        kinds.append(first_of.setdefault(key, block))
    return kinds


def _decoder_block_bytes(table: ModelTable, shape: JobShape, block: int) -> int:
    """What a block keeps that looks at its own tokens and at an encoder's output, which all blocks share."""
    family = family_of(table.family)
    adapted = adapted_linears(table, shape, block)
    of_source = tuple(one for one in adapted if family.all_linears[one.name].reads == ENCODER_OUTPUT)
    of_target = tuple(one for one in adapted if one not in of_source)
    query_bytes = shape.dtype_bytes * table.num_heads * table.head_dim
    # What a method's layers keep of the target's tokens and, with LoRA, of the source's.
    rank_bytes = _lora_compute_bytes(shape) * _rank_sum(shape, block) if shape.adapter_params[block] else 0
    num_of_source = 0 if shape.trains_weights else len(of_source)
    source_rank_bytes = rank_bytes // max(len(adapted), 1) * num_of_source
    mask_heads = table.num_heads if family.biases_heads else 1
    target_bytes = (
        norm_token_bytes(table, replace(family, num_norms=family.num_norms + 1), shape.dtype_bytes)
        + attention_token_bytes(table, family, shape.dtype_bytes, target_tokens(shape), has_past=False)
        # Of cross-attention: queries, output, statistics and its copy of the mask.
        + 2 * query_bytes
        + _FP32_BYTES * table.num_heads
        + shape.dtype_bytes * shape.row_tokens * mask_heads
        + mlp_token_bytes(table, family, shape.dtype_bytes, block)
        + _lora_token_bytes(shape, family, of_target)
        + rank_bytes
        - source_rank_bytes
    )
    source_bytes = 2 * query_bytes + _lora_token_bytes(shape, family, of_source) + source_rank_bytes
    num_targets = shape.micro_batch_rows * target_tokens(shape)
    saved_bytes = num_targets * target_bytes + micro_batch_tokens(shape) * source_bytes
    if shape.dtype_bytes < _FP32_BYTES and shape.adapter_cast_params:
        saved_bytes += shape.dtype_bytes * shape.adapter_cast_params[block]
    return saved_bytes + _trained_biases_bytes(table, shape, target_tokens(shape))


def target_tokens(shape: JobShape) -> int:
    """Tokens of an encoder-decoder's longest target; all of them carry loss."""
    return -(-shape.label_tokens // shape.micro_batch_rows)


def _trained_biases_bytes(table: ModelTable, shape: JobShape, row_tokens: int) -> int:
    """What a block keeps more where the biases of its scores are trained: torch has no kernel for their gradient.

    Attention is then computed in fp32 from copies of queries, keys and values and keeps its probabilities instead of
    biases and statistics; each block looks its biases up itself, by int64 places, and keeps where they are masked.
    """
    if not _trains_biases(table, shape):
        return 0
    widened_bytes = _FP32_BYTES - shape.dtype_bytes
    token_bytes = widened_bytes * table.num_heads * (3 * table.head_dim + row_tokens) - _FP32_BYTES * table.num_heads
    return shape.micro_batch_rows * row_tokens * token_bytes + (8 + shape.micro_batch_rows) * row_tokens**2


def _trains_biases(table: ModelTable, shape: JobShape) -> bool:
    return shape.trains_weights and family_of(table.family).biases_heads


def _past_bytes(table: ModelTable, shape: JobShape, family: Family) -> int:
    """Keys and values of the virtual tokens, which attention keeps beside those of every row."""
    if not shape.past_tokens:
        return 0
    kept_bytes = 2 * shape.dtype_bytes * table.num_heads * table.head_dim * shape.micro_batch_rows * shape.past_tokens
    if family.has_conv1d:
        # Queries stay a view of the fused projection's output; keys and values are copies behind the past.
        kept_bytes += 2 * shape.dtype_bytes * table.hidden_size * micro_batch_tokens(shape)
    return kept_bytes


def _side_block_bytes(table: ModelTable, shape: JobShape, block: int) -> int:
    """What a side block keeps, and what it reads of the backbone; the backbone's block itself keeps nothing."""
    narrow = narrow_table(table, shape.side_reduction, has_whole_heads=shape.side_has_whole_heads)
    side_shape = _side_shape(shape)
    width, side_width = table.hidden_size, narrow.hidden_size
    family = family_of(table.family)
    # The block's output, which the projection multiplies; the state that is mixed with it, and both factors.
    token_bytes = shape.dtype_bytes * width + 3 * _FP32_BYTES * side_width
    is_decoders = block >= table.num_encoder_blocks > 0
    is_entry = is_decoders and not any(shape.adapter_params[table.num_encoder_blocks : block])
    if is_entry or block == shape.first_trainable_block:
        token_bytes += shape.dtype_bytes * width + _FP32_BYTES * side_width
    if family.norm == "rms":
        # A trained norm keeps what its weight multiplies.
        token_bytes += _FP32_BYTES * family.num_norms * side_width
        if family.qk_norm != "none":
            token_bytes += _FP32_BYTES * (narrow.num_heads + narrow.num_kv_heads) * narrow.head_dim
    cast_bytes = 2 * shape.dtype_bytes * width * side_width if shape.dtype_bytes < _FP32_BYTES else 0
    row_tokens = target_tokens(shape) if is_decoders else shape.row_tokens
    saved_bytes = shape.micro_batch_rows * row_tokens * token_bytes + cast_bytes
    if is_entry:
        # What all of the decoder's side blocks look at.
        saved_bytes += micro_batch_tokens(shape) * _FP32_BYTES * side_width
    if table.repeated_params:
        # Each side block looks its position biases up itself, by int64 places.
        saved_bytes += 8 * row_tokens**2
    return saved_bytes + saved_block_bytes(narrow, side_shape, block)


def narrow_table(table: ModelTable, reduction: int, *, has_whole_heads: bool) -> ModelTable:
    """The model with all widths divided, as a side network's blocks have them; of heads their number or their width."""
    head_parts, dim_parts = (reduction, 1) if has_whole_heads else (1, reduction)
    return table.model_copy(
        update={
            "hidden_size": table.hidden_size // reduction,
            "intermediate_size": table.intermediate_size // reduction,
            "num_heads": table.num_heads // head_parts,
            "num_kv_heads": table.num_kv_heads // head_parts,
            "head_dim": table.head_dim // dim_parts,
            "block_linears": tuple(
                tuple(
                    LinearShape(
                        name=linear.name,
                        in_features=linear.in_features // reduction,
                        out_features=linear.out_features // reduction,
                    )
                    for linear in linears
                )
                for linears in table.block_linears
            ),
        }
    )


def _side_shape(shape: JobShape) -> JobShape:
    """The job as a side block sees it: in fp32, and every linear layer keeps its input as an adapted one does."""
    return shape.model_copy(
        update={"dtype": "fp32", "side_reduction": 0, "adapted_linears": (), "adapter_cast_params": ()}
    )


def block_token_bytes(table: ModelTable, shape: JobShape, block: int, row_tokens: int) -> int:
    """Bytes a token that one block keeps where rows see ``row_tokens``; no pass without autograd holds more at once."""
    family = family_of(table.family)
    token_bytes = norm_token_bytes(table, family, shape.dtype_bytes)
    token_bytes += attention_token_bytes(table, family, shape.dtype_bytes, row_tokens, has_past=shape.past_tokens > 0)
    token_bytes += mlp_token_bytes(table, family, shape.dtype_bytes, block)
    token_bytes += _lora_token_bytes(shape, family, adapted_linears(table, shape, block))
    if shape.adapter_params[block]:
        token_bytes += _lora_compute_bytes(shape) * _rank_sum(shape, block)
    return token_bytes


def boundary_bytes(table: ModelTable, shape: JobShape) -> int:
    """Bytes of the hidden states of one micro-batch in the compute dtype, with the side state where there is one."""
    side_bytes = _FP32_BYTES * (table.hidden_size // shape.side_reduction) if shape.side_reduction else 0
    num_tokens = micro_batch_tokens(shape)
    if table.num_encoder_blocks:
        # The longest source and the longest target may be in different rows.
        num_tokens += shape.micro_batch_rows * target_tokens(shape)
    return num_tokens * (table.hidden_size * shape.dtype_bytes + side_bytes)


def shared_bytes(table: ModelTable, shape: JobShape) -> int:
    """Bytes that all blocks of a stage keep together of one micro-batch: rotary angles, positions and masks."""
    rotary_bytes = 2 * table.head_dim * shape.dtype_bytes
    seen_tokens = shape.row_tokens + shape.past_tokens
    mask_bytes = seen_tokens
    if family_of(table.family).attention == "eager":
        # Additive, for full attention and for sliding windows.
        mask_bytes += 2 * seen_tokens * shape.dtype_bytes
    if table.adds_alibi or family_of(table.family).biases_heads:
        mask_bytes += table.num_heads * seen_tokens * shape.dtype_bytes
    return micro_batch_tokens(shape) * (rotary_bytes + 2 * 8 + mask_bytes)


def head_bytes(table: ModelTable, shape: JobShape) -> int:
    """Bytes of final norm, logits and loss of one micro-batch at their peak, in the backward pass.

    Log-softmax, its incoming and its outgoing gradient stand side by side in fp32; logits exist for label tokens only.
    """
    norm_bytes = micro_batch_tokens(shape) * _FP32_BYTES * (table.hidden_size + 1)
    if shape.side_reduction:
        # The side state's norm and its part of the hidden states, before and after they are added.
        side_width = table.hidden_size // shape.side_reduction
        norm_bytes += micro_batch_tokens(shape) * _FP32_BYTES * (4 * side_width + 2 * table.hidden_size)
    num_labels = shape.most_label_tokens
    logit_bytes = num_labels * table.vocab_size * 3 * _FP32_BYTES
    if family_of(table.family).has_soft_caps:
        logit_bytes += num_labels * table.vocab_size * shape.dtype_bytes
    return norm_bytes + logit_bytes + num_labels * table.hidden_size * (_FP32_BYTES + shape.dtype_bytes)


def workspace_bytes(table: ModelTable, shape: JobShape) -> int:
    """Bytes of the largest temporaries inside one block's forward or backward pass.

    The backward pass of the MLP holds two gradients of its inner tensor, that of attention those of q, k, v and of the
    block's input, and norms compute in fp32; whichever is largest. The factors are the smallest that covered every peak
    measured with torch's memory profiler over widths D and F from F = D / 4 to F = 8 D.
    """
    inner, hidden = table.intermediate_size, table.hidden_size
    if table.expert_blocks:
        # Every token stands there once for each of its experts.
        inner = max(inner, table.experts_per_token * table.expert_inner)
        hidden *= table.experts_per_token
    if shape.use_dora and shape.dtype == "bf16":
        # Its share is fp32, with casts beside it.
        token_bytes = max(8 * inner + 8 * hidden, 24 * hidden)
    elif shape.dtype == "fp32":
        token_bytes = max(8 * inner, 17 * hidden)
    else:
        token_bytes = max(3 * inner, 15 * hidden)
    if keeps_scores(table) or _trains_biases(table, shape):
        # Gradients of probabilities and of scores, in fp32.
        token_bytes += 2 * _FP32_BYTES * table.num_heads * (shape.row_tokens + shape.past_tokens)
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


def has_small_tensors(table: ModelTable, shape: JobShape) -> bool:
    """Whether a micro-batch's hidden states are too small for mappings of their own; see :mod:`partitioner.heap`."""
    hidden_bytes = micro_batch_tokens(shape) * table.hidden_size * shape.dtype_bytes
    return not shape.is_on_cards and hidden_bytes < SMALLEST_MAPPING_BYTES


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


def _lora_token_bytes(shape: JobShape, family: Family, adapted: tuple[LinearShape, ...]) -> int:
    token_bytes = 0
    shared: set[str] = {ATTENTION_OUTPUT, ENCODER_OUTPUT}
    for linear in adapted:
        source = family.all_linears[linear.name].reads
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
