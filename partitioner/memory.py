"""The memory bill of one stage: what a worker holds at its peak beyond its measured baseline.

Entry points: :func:`stage_memory` for one stage, :class:`MemoryModel` where many stages of one job are priced. Bytes
are those of a torch worker on a CPU that trains an adapter on a frozen base by 1F1B (Narayanan et al. 2021,
arXiv:2104.04473 sec. 2.2): a stage holds the activations of as many micro-batches as stages lie from it to the end.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

from partitioner import activations
from partitioner.model import JobShape, ModelTable
from partitioner.plan import MemoryItem
from plutino.errors import PlanError

TRAINED_BYTES_PER_PARAM = 16
"""fp32 value, gradient and the two moments of AdamW."""

SHADOW_BYTES_PER_PARAM = 12
"""A snapshot holds value and both moments until the coordinator has stored it."""

_FP32_BYTES = 4

_MESSAGES_PER_NEIGHBOUR = 6
"""Two queued and one in the works, in each of the two directions."""

_STREAM_BYTES = 8 << 20
"""gRPC's own buffers of one stream: chunks of up to 4 MiB in both directions."""

_ALLOCATOR_SHARE = 0.12
"""malloc keeps freed pieces that the next micro-batch cannot use again: at most this share of all that comes and goes
(measured: resident set against the sum of live tensors, with and without checkpointing).

It holds for glibc with a fixed mmap threshold of 256 KiB. With a threshold above the size of an activation every tensor
comes from the heap, where glibc (2.36) cannot put an aligned block into a hole of its own size: the resident set then
grows to twice the live tensors and stays there."""

_ALLOCATOR_FLOOR_BYTES = 16 << 20
"""Scratch space of matrix products and pieces of arenas that a worker of any size takes (benchmarks/memory.py)."""


_HEAP_SHARE = 1.1
"""The same with the threshold above every tensor: faster, because no page is faulted in twice, and fuller."""


def heap_reuse(items: Sequence[MemoryItem]) -> MemoryItem:
    """What a stage takes on top of its bill if malloc keeps every freed block on the heap."""
    allocator = next(item.bytes for item in items if item.name == "allocator")
    coming_and_going = (allocator - _ALLOCATOR_FLOOR_BYTES) / _ALLOCATOR_SHARE
    return MemoryItem(
        name="heap reuse",
        bytes=int((_HEAP_SHARE - _ALLOCATOR_SHARE) * coming_and_going),
        why="freed blocks stay on the heap, which saves page faults: the budget has room for it",
    )


def stage_memory(
    table: ModelTable,
    shape: JobShape,
    *,
    start_block: int,
    end_block: int,
    num_stages: int,
    stage_index: int,
    checkpointing: bool,
) -> tuple[MemoryItem, ...]:
    """Peak job bytes of the stage that holds blocks ``[start_block, end_block)``, item by item.

    The peak of the worker's resident memory is its baseline plus their sum.

    Raises:
        PlanError: the model has no such blocks, or the plan no such stage.
    """
    return MemoryModel(table, shape).items(
        start_block, end_block, num_stages=num_stages, stage_index=stage_index, checkpointing=checkpointing
    )


def micro_batches_in_flight(num_stages: int, stage_index: int, num_micro_batches: int) -> int:
    """Micro-batches between their forward and their backward pass on one stage, at most, under 1F1B."""
    return min(num_stages - stage_index, num_micro_batches)


class MemoryModel:
    """Prices stages of one job; sums over blocks are prepared once."""

    def __init__(self, table: ModelTable, shape: JobShape) -> None:
        """Prepare the sums.

        Raises:
            PlanError: the shape's adapter is not that of this model.
        """
        if len(shape.adapter_params) != table.num_blocks:
            raise PlanError(
                f"the adapter is described for {len(shape.adapter_params)} blocks, the model has {table.num_blocks}"
            )
        blocks = range(table.num_blocks)
        self._table = table
        self._shape = shape
        self._saved_bytes = [activations.saved_block_bytes(table, shape, block) for block in blocks]
        self._sum_saved_bytes = _prefix_sums(self._saved_bytes)
        self._sum_params = _prefix_sums(table.block_params)
        self._sum_trainable = _prefix_sums(shape.adapter_params)
        self._boundary_bytes = activations.boundary_bytes(table, shape)
        self._shared_bytes = activations.shared_bytes(table, shape)
        self._head_bytes = activations.head_bytes(table, shape)
        self._workspace_bytes = activations.workspace_bytes(table, shape)
        wire_bytes = min(2, shape.dtype_bytes) if shape.codec == "bf16" else shape.dtype_bytes
        self._message_bytes = self._boundary_bytes // shape.dtype_bytes * wire_bytes
        self._generation_token_bytes = max(
            activations.block_token_bytes(table, shape, block, shape.generate_tokens) for block in blocks
        )

    def job_bytes(
        self, start_block: int, end_block: int, *, num_stages: int, stage_index: int, checkpointing: bool
    ) -> int:
        """Sum of :meth:`items`."""
        bill = self._bill(start_block, end_block, num_stages, stage_index, checkpointing)
        return sum(size_bytes for _, size_bytes, _ in bill)

    def items(
        self, start_block: int, end_block: int, *, num_stages: int, stage_index: int, checkpointing: bool
    ) -> tuple[MemoryItem, ...]:
        """See :func:`stage_memory`; items of 0 bytes are left out."""
        bill = self._bill(start_block, end_block, num_stages, stage_index, checkpointing)
        return tuple(MemoryItem(name=name, bytes=size_bytes, why=why) for name, size_bytes, why in bill if size_bytes)

    def _bill(
        self, start_block: int, end_block: int, num_stages: int, stage_index: int, checkpointing: bool
    ) -> list[tuple[str, int, str]]:
        table, shape = self._table, self._shape
        if not 0 <= start_block < end_block <= table.num_blocks or not 0 <= stage_index < num_stages:
            raise PlanError(
                f"stage {stage_index} of {num_stages} with blocks [{start_block}, {end_block}) does not exist in a "
                f"model of {table.num_blocks} blocks"
            )
        is_first, is_last = stage_index == 0, stage_index == num_stages - 1
        num_params = self._num_params(start_block, end_block, is_first, is_last)
        num_trainable = self._num_trainable(start_block, end_block, is_first, is_last)
        kept_bytes, kept_why = self._activations(start_block, end_block, num_stages, stage_index, checkpointing)
        weight_bytes = num_params * shape.dtype_bytes
        has_several = shape.num_micro_batches > 1
        num_neighbours = (not is_first) + (not is_last)
        training = [
            ("activations", kept_bytes, kept_why),
            (
                "logits and loss",
                self._head_bytes if is_last else 0,
                f"{shape.label_tokens} label tokens x {table.vocab_size} words, in fp32, and the final norm",
            ),
            ("workspace", self._workspace_bytes, "largest temporaries of one block"),
        ]
        passing_bytes = sum(size_bytes for _, size_bytes, _ in training)
        generation_bytes = self._generation_bytes(end_block - start_block, num_stages, is_last)
        held = [
            ("weights", weight_bytes, f"{num_params} frozen parameters in {shape.dtype}"),
            (
                "adapter and optimiser",
                num_trainable * TRAINED_BYTES_PER_PARAM,
                f"{num_trainable} trainable parameters: value, gradient and two moments in fp32",
            ),
            (
                "gradient of one micro-batch",
                num_trainable * _FP32_BYTES if has_several else 0,
                "stands beside the step's sum until it is added",
            ),
            (
                "wire queues",
                num_neighbours * (_MESSAGES_PER_NEIGHBOUR * self._message_bytes + _STREAM_BYTES),
                f"{_MESSAGES_PER_NEIGHBOUR} messages for each of {num_neighbours} neighbours, and the streams' buffers",
            ),
            ("shadow snapshot", num_trainable * SHADOW_BYTES_PER_PARAM, "a copy of value and moments, being sent"),
        ]
        generation = (
            "generation",
            max(0, generation_bytes - passing_bytes),
            f"KV cache of {shape.generate_rows} rows x {shape.generate_tokens} tokens; what exceeds training's own",
        )
        coming_and_going = max(passing_bytes, generation_bytes)
        allocator = (
            "allocator",
            _ALLOCATOR_FLOOR_BYTES + int(_ALLOCATOR_SHARE * coming_and_going),
            f"freed pieces that malloc keeps: {_ALLOCATOR_SHARE:.0%} of what comes and goes",
        )
        running = [*held, *training, generation, allocator]
        running_bytes = sum(size_bytes for _, size_bytes, _ in running)
        loading_bytes = weight_bytes + table.largest_tensor_params * (_FP32_BYTES + shape.dtype_bytes)
        loading = ("loading peak", max(0, loading_bytes - running_bytes), "largest tensor as read and as converted")
        return [*running, loading]

    def _num_params(self, start_block: int, end_block: int, is_first: bool, is_last: bool) -> int:
        table = self._table
        params = self._sum_params[end_block] - self._sum_params[start_block]
        params += table.embedding_params if is_first else 0
        if is_last:
            # A tied head is the embedding's own storage where the stage has both.
            params += table.final_params + (0 if table.is_tied and is_first else table.head_params)
        return params

    def _num_trainable(self, start_block: int, end_block: int, is_first: bool, is_last: bool) -> int:
        shape = self._shape
        params = self._sum_trainable[end_block] - self._sum_trainable[start_block]
        params += shape.first_trainable_params if is_first else 0
        return params + (shape.last_trainable_params if is_last else 0)

    def _activations(
        self, start_block: int, end_block: int, num_stages: int, stage_index: int, checkpointing: bool
    ) -> tuple[int, str]:
        shape = self._shape
        num_kept = end_block - max(start_block, min(shape.first_trainable_block, end_block))
        if num_kept == 0 and not (stage_index == num_stages - 1 and shape.last_trainable_params):
            # Forward only: the hidden states come in, go out, and are not kept.
            return 2 * self._boundary_bytes + self._shared_bytes, "a stage without backward pass keeps nothing"
        in_flight = micro_batches_in_flight(num_stages, stage_index, shape.num_micro_batches)
        # Incoming and outgoing hidden states are held by the executor; on the wire they come and go with gradients.
        fixed_bytes = 2 * self._boundary_bytes + self._shared_bytes
        rows = f"{in_flight} micro-batches of {shape.micro_batch_rows} x {shape.row_tokens} tokens in flight"
        if not checkpointing:
            saved_bytes = self._sum_saved_bytes[end_block] - self._sum_saved_bytes[start_block]
            return in_flight * (fixed_bytes + saved_bytes), rows
        recomputed_bytes = max(self._saved_bytes[start_block:end_block])
        kept_bytes = in_flight * (fixed_bytes + num_kept * self._boundary_bytes) + recomputed_bytes
        return kept_bytes, f"{rows}: the blocks' inputs, and all of one block while it is recomputed"

    def _generation_bytes(self, num_blocks: int, num_stages: int, is_last: bool) -> int:
        """KV cache and temporaries of generation, which runs between steps, when no activation of training is held."""
        table, shape = self._table, self._shape
        if not shape.generate_rows:
            return 0
        kv_token_bytes = 2 * table.num_kv_heads * table.head_dim * shape.dtype_bytes
        # As many groups of rows as stages are in flight; a cache grows by copying one block's part of one group.
        group_rows = -(-shape.generate_rows // num_stages)
        tokens, group_tokens = shape.generate_rows * shape.generate_tokens, group_rows * shape.generate_tokens
        kv_bytes = kv_token_bytes * (tokens * num_blocks + group_tokens)
        logit_bytes = group_rows * table.vocab_size * 3 * _FP32_BYTES if is_last else 0
        return kv_bytes + group_tokens * self._generation_token_bytes + logit_bytes


def _prefix_sums(values: list[int] | tuple[int, ...]) -> list[int]:
    return list(accumulate(values, initial=0))
