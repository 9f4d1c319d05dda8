"""The memory bill of one stage: what a worker holds at its peak beyond its measured baseline.

Entry points: :func:`stage_memory` for one stage, :class:`MemoryModel` where many stages of one job are priced. Bytes
are those of a torch worker on a CPU that trains an adapter on a frozen base by 1F1B (Narayanan et al. 2021,
arXiv:2104.04473 sec. 2.2): a stage holds the activations of as many micro-batches as stages lie from it to the end.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from partitioner import activations, heap
from partitioner.gradient_pass import gradient_block_bytes, matrix_gradient_bytes
from partitioner.model import ModelTable
from partitioner.packed import WeightSizes
from partitioner.place import Ints, Place, ReplicaShare, place_of
from partitioner.plan import MemoryItem
from partitioner.product_code import KEPT_PRODUCTS, product_code_bytes
from partitioner.shape import JobShape
from plutino.errors import PlanError

Bools = npt.NDArray[np.bool_]

TRAINED_BYTES_PER_PARAM = 16
"""fp32 value, gradient and the two moments of AdamW."""

SHADOW_BYTES_PER_PARAM = 12
"""A snapshot holds value and both moments until the coordinator has stored it."""

_FP32_BYTES = 4

_MESSAGES_PER_NEIGHBOUR = 6
"""Two queued and one in the works, in each of the two directions."""

_GRADIENT_COPIES = 2
"""Of gradients that all stages add up: those of every block, and the sum that passes through."""

HEAP_REUSE = "heap reuse"
"""Name of the item that a worker has only if its malloc keeps every freed block on the heap."""

_STREAM_BYTES = 8 << 20
"""gRPC's own buffers of one stream: chunks of up to 4 MiB in both directions."""


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
        self._table = table
        self._shape = shape
        kinds = activations.block_kinds(table, shape)
        saved_bytes = {block: activations.saved_block_bytes(table, shape, block) for block in set(kinds)}
        self._saved_bytes = [saved_bytes[kind] for kind in kinds]
        self.is_uniform = len(set(kinds)) == 1
        """All blocks weigh the same, so that a stage's bytes follow from its number of blocks and its place."""
        self._sum_saved_bytes = _prefix_sums(self._saved_bytes)
        self._sum_gradient_bytes = None
        if shape.prunes_by_gradients:
            gradient_bytes = {block: gradient_block_bytes(table, shape, block) for block in set(kinds)}
            self._sum_gradient_bytes = _prefix_sums([gradient_bytes[kind] for kind in kinds])
        self._most_saved_bytes = _range_maxima(self._saved_bytes)
        self._weights = WeightSizes(table, shape)
        self._sum_trainable = _prefix_sums(shape.adapter_params)
        self._boundary_bytes = activations.boundary_bytes(table, shape)
        self._shared_bytes = activations.shared_bytes(table, shape)
        self._head_bytes = activations.head_bytes(table, shape)
        self._workspace_bytes = activations.workspace_bytes(table, shape)
        self._is_small = activations.has_small_tensors(table, shape)
        wire_bytes = min(2, shape.dtype_bytes) if shape.codec == "bf16" else shape.dtype_bytes
        self._message_bytes = self._boundary_bytes // shape.dtype_bytes * wire_bytes
        self._generation_token_bytes = max(
            activations.block_token_bytes(table, shape, block, shape.generate_tokens) for block in set(kinds)
        )

    def job_bytes(
        self,
        start_block: int,
        end_block: int,
        *,
        num_stages: int,
        stage_index: int,
        checkpointing: bool,
        share: ReplicaShare | None = None,
    ) -> int:
        """Sum of :meth:`items`."""
        place = self._place(num_stages, stage_index, share)
        self._check(start_block, end_block, num_stages, stage_index)
        return int(self.bytes_of(np.asarray(start_block), np.asarray(end_block), place, checkpointing=checkpointing))

    def bytes_of(
        self, start_block: Ints, end_block: Ints, place: Place, *, checkpointing: bool, keeps_heap: bool = False
    ) -> Ints:
        """Job bytes of many stages at once; the arrays are broadcast against each other.

        Args:
            start_block: first blocks.
            end_block: one past the last blocks, each larger than its start.
            place: where in the pipeline the stages stand.
            checkpointing: whether blocks are recomputed.
            keeps_heap: as for :meth:`items`.
        """
        total = np.zeros((), dtype=np.int64)
        for size_bytes in self._bill(start_block, end_block, place, checkpointing, keeps_heap=keeps_heap).values():
            total = total + size_bytes
        return total

    def items(
        self,
        start_block: int,
        end_block: int,
        *,
        num_stages: int,
        stage_index: int,
        checkpointing: bool,
        share: ReplicaShare | None = None,
        keeps_heap: bool = False,
    ) -> tuple[MemoryItem, ...]:
        """See :func:`stage_memory`; items of 0 bytes are left out.

        ``keeps_heap``: malloc serves all but the largest blocks from the heap and keeps what is freed.
        """
        self._check(start_block, end_block, num_stages, stage_index)
        place = self._place(num_stages, stage_index, share)
        bill = self._bill(np.asarray(start_block), np.asarray(end_block), place, checkpointing, keeps_heap=keeps_heap)
        whys = self._whys(start_block, end_block, place, checkpointing)
        return tuple(
            MemoryItem(name=name, bytes=int(size_bytes), why=whys[name])
            for name, size_bytes in bill.items()
            if size_bytes
        )

    def _place(self, num_stages: int, stage_index: int, share: ReplicaShare | None) -> Place:
        return place_of(num_stages, stage_index, self._shape.num_micro_batches, share)

    def _check(self, start_block: int, end_block: int, num_stages: int, stage_index: int) -> None:
        if not 0 <= start_block < end_block <= self._table.num_blocks or not 0 <= stage_index < num_stages:
            raise PlanError(
                f"stage {stage_index} of {num_stages} with blocks [{start_block}, {end_block}) does not exist in a "
                f"model of {self._table.num_blocks} blocks"
            )

    def _bill(
        self, start_block: Ints, end_block: Ints, place: Place, checkpointing: bool, *, keeps_heap: bool = False
    ) -> dict[str, Ints]:
        """Name of every item -> its bytes, for all stages at once."""
        shape = self._shape
        num_trainable = self._num_trainable(start_block, end_block, place)
        weights, ends = self._weights, {"is_first": place.is_first, "is_last": place.is_last}
        weight_bytes = weights.plain_params(start_block, end_block, **ends) * shape.dtype_bytes
        packed_bytes = weights.packed_bytes(start_block, end_block, **ends)
        recomputed_bytes = self._recomputed(start_block, end_block, place, checkpointing)
        # The loss is done, and its tensors are gone, before the last block's backward pass takes its own.
        loss_bytes = np.asarray(self._head_bytes if place.is_last else 0)
        training = {
            "activations": self._activations(start_block, end_block, place, checkpointing) + recomputed_bytes,
            "logits and loss": np.maximum(0, loss_bytes - recomputed_bytes - self._workspace_bytes),
            "workspace": np.asarray(self._workspace_bytes),
        }
        passing_bytes = training["activations"] + training["logits and loss"] + training["workspace"]
        generation_bytes = self._generation_bytes(end_block - start_block, place)
        # Weights that are trained themselves are in the bill already; bf16 ones have a master each.
        is_own = shape.trains_weights and shape.dtype == "fp32"
        trained_bytes = TRAINED_BYTES_PER_PARAM - (_FP32_BYTES if is_own else 0)
        pruning_bytes = self._pruning_bytes(start_block, end_block, place)
        coming_and_going = np.maximum(np.maximum(passing_bytes, generation_bytes), pruning_bytes)
        dropped_bytes = self._dropped(start_block, end_block, checkpointing)
        copied_bytes = num_trainable * (_FP32_BYTES * place.gradient_copies)
        # Before the first step what is trained has no gradient and no moments. It has no snapshot either, but workers
        # of a pipeline were measured to need most of that room.
        not_yet_bytes = num_trainable * (trained_bytes - _FP32_BYTES) + copied_bytes
        bill = {
            "weights": weight_bytes,
            "packed weights": packed_bytes,
            "unpacking": np.asarray(weights.workspace_bytes(is_last=place.is_last)),
            "adapter and optimiser": num_trainable * trained_bytes,
            "gradient of one micro-batch": copied_bytes,
            "shared gradients": np.asarray(
                shape.stage_trainable_params * _FP32_BYTES * _GRADIENT_COPIES * self._table.num_blocks
            ),
            "wire queues": np.asarray(
                (not shape.is_on_cards)
                * place.num_peers
                * (_MESSAGES_PER_NEIGHBOUR * self._message_bytes + _STREAM_BYTES)
            ),
            "shadow snapshot": num_trainable * ((not shape.is_on_cards) * SHADOW_BYTES_PER_PARAM),
            **training,
            "product code": np.asarray(product_code_bytes(shape.dtype, is_on_cards=shape.is_on_cards)),
            "generation": np.maximum(0, generation_bytes - passing_bytes),
            "pruning": np.maximum(0, pruning_bytes - not_yet_bytes - np.maximum(passing_bytes, generation_bytes)),
            "allocator": heap.small_bytes(coming_and_going, dropped_bytes)
            if self._is_small
            else heap.mapped_bytes(coming_and_going),
        }
        if keeps_heap and not self._is_small:
            other_bytes = num_trainable * _FP32_BYTES + copied_bytes + bill["shadow snapshot"]
            # Kept products come and go as lengths do, and what lies between them on the heap stays.
            other_bytes = other_bytes + bill["product code"]
            reuse_bytes = heap.reuse_bytes(coming_and_going, dropped_bytes, other_bytes)
            bill[HEAP_REUSE] = reuse_bytes - bill["allocator"]
        running_bytes = sum(bill.values(), np.zeros((), dtype=np.int64))
        loading_bytes = weight_bytes + packed_bytes + weights.reading_bytes()
        return bill | {"loading peak": np.maximum(0, loading_bytes - running_bytes)}

    def _whys(self, start_block: int, end_block: int, place: Place, checkpointing: bool) -> dict[str, str]:
        """Name of every item -> where its bytes come from."""
        table, shape = self._table, self._shape
        start, end = np.asarray(start_block), np.asarray(end_block)
        rows = f"{place.in_flight} micro-batches of {shape.micro_batch_rows} x {shape.row_tokens} tokens in flight"
        if not self._keeps_activations(start, end, place):
            rows = "a stage without backward pass keeps nothing"
        elif shape.side_reduction:
            rows += ": what the side network reads and keeps"
        elif checkpointing:
            rows += ": the blocks' inputs, and all of one block while it is recomputed"
        weights, ends = self._weights, {"is_first": place.is_first, "is_last": place.is_last}
        num_packed = int(weights.packed_params(start, end, **ends))
        bits = 8 * int(weights.packed_bytes(start, end, **ends)) / max(num_packed, 1)
        return {
            "weights": f"{weights.plain_params(start, end, **ends)} "
            f"{'trained' if shape.trains_weights else 'frozen'} parameters in {shape.dtype}",
            "packed weights": f"{num_packed} frozen parameters, {bits:.2f} bits each with all constants",
            "unpacking": "the largest matrix, or a tile of it, as it is unpacked for one product"
            if shape.packing.products == "dequantised"
            else "activations rounded to int8 and the int32 sums of one product",
            "adapter and optimiser": f"{self._num_trainable(start, end, place)} trainable parameters: value, gradient "
            "and two moments in fp32",
            "gradient of one micro-batch": "stands beside the step's sum until it is added"
            if place.gradient_copies <= 1
            else f"{place.gradient_copies} copies: replicas hand over each micro-batch's gradient apart",
            "shared gradients": f"{shape.stage_trainable_params} parameters that all blocks use: a gradient for each "
            "block, and once more on its way to the sum",
            "wire queues": f"{_MESSAGES_PER_NEIGHBOUR} messages for each of {place.num_peers} neighbours, and the "
            "streams' buffers",
            "shadow snapshot": "a copy of value and moments, being sent",
            "activations": rows,
            "logits and loss": f"{shape.most_label_tokens} label tokens x {table.vocab_size} words, in fp32, and the "
            "final norm; what exceeds the temporaries of a block, which come after",
            "workspace": "largest temporaries of one block",
            "product code": f"what the library keeps of the last {KEPT_PRODUCTS} shapes of products in bf16",
            "generation": f"KV cache of {shape.generate_rows} rows x {shape.generate_tokens} tokens; what exceeds "
            "training's own",
            "pruning": "one micro-batch backward through the blocks, before the first step; what exceeds training's",
            "allocator": self._why_allocator(checkpointing),
            HEAP_REUSE: "freed blocks stay on the heap, which saves page faults: the budget has room for it",
            "loading peak": "what is read and not yet converted or packed",
        }

    def _why_allocator(self, checkpointing: bool) -> str:
        if not self._is_small:
            return f"freed pieces that malloc keeps: {heap.MAPPED_SHARE:.0%} of what comes and goes"
        again = ", recomputed blocks included" if checkpointing else ""
        return (
            f"freed pieces that malloc keeps: {heap.SMALL_SHARE:.0%} of what comes and goes{again}, for tensors this "
            "small lie on the heap"
        )

    def _num_trainable(self, start_block: Ints, end_block: Ints, place: Place) -> Ints:
        shape = self._shape
        outside = shape.first_trainable_params if place.is_first else 0
        outside += shape.last_trainable_params if place.is_last else 0
        return (
            self._sum_trainable[end_block] - self._sum_trainable[start_block] + outside + shape.stage_trainable_params
        )

    def _num_kept(self, start_block: Ints, end_block: Ints) -> Ints:
        return end_block - np.maximum(start_block, np.minimum(self._shape.first_trainable_block, end_block))

    def _keeps_activations(self, start_block: Ints, end_block: Ints, place: Place) -> Bools:
        trains_head = place.is_last and self._shape.last_trainable_params > 0
        return (self._num_kept(start_block, end_block) > 0) | trains_head

    def _activations(self, start_block: Ints, end_block: Ints, place: Place, checkpointing: bool) -> Ints:
        # Incoming and outgoing hidden states are held by the executor; on the wire they come and go with gradients.
        fixed_bytes = 2 * self._boundary_bytes + self._shared_bytes
        # A side network is not recomputed, and the blocks beside it keep nothing.
        if checkpointing and not self._shape.side_reduction:
            num_kept = self._num_kept(start_block, end_block)
            kept_bytes = place.in_flight * (fixed_bytes + num_kept * self._boundary_bytes)
        else:
            saved_bytes = self._sum_saved_bytes[end_block] - self._sum_saved_bytes[start_block]
            kept_bytes = place.in_flight * (fixed_bytes + saved_bytes)
        # Forward only: the hidden states come in, go out, and are not kept.
        return np.where(self._keeps_activations(start_block, end_block, place), kept_bytes, fixed_bytes)

    def _recomputed(self, start_block: Ints, end_block: Ints, place: Place, checkpointing: bool) -> Ints:
        """What the one block holds that is being recomputed."""
        if not checkpointing:
            return np.asarray(0)
        recomputed_bytes = self._most_saved_bytes[start_block, end_block]
        return np.where(self._keeps_activations(start_block, end_block, place), recomputed_bytes, 0)

    def _dropped(self, start_block: Ints, end_block: Ints, checkpointing: bool) -> Ints:
        """What recomputing the blocks of one micro-batch makes, one after the other, beyond what one of them holds."""
        if not checkpointing:
            return np.zeros((), dtype=np.int64)
        saved_bytes = self._sum_saved_bytes[end_block] - self._sum_saved_bytes[start_block]
        return saved_bytes - self._most_saved_bytes[start_block, end_block]

    def _pruning_bytes(self, start_block: Ints, end_block: Ints, place: Place) -> Ints:
        """What one micro-batch's gradients through the blocks take, before the first step."""
        if self._sum_gradient_bytes is None:
            return np.zeros((), dtype=np.int64)
        saved_bytes = self._sum_gradient_bytes[end_block] - self._sum_gradient_bytes[start_block]
        matrix_bytes = matrix_gradient_bytes(self._table, self._shape)
        beside_bytes = max(self._workspace_bytes + matrix_bytes, self._head_bytes if place.is_last else 0)
        whole_bytes = 2 * self._boundary_bytes + self._shared_bytes + saved_bytes + beside_bytes
        return np.where(self._keeps_activations(start_block, end_block, place), whole_bytes, 0)

    def _generation_bytes(self, num_blocks: Ints, place: Place) -> Ints:
        """KV cache and temporaries of generation, which runs between steps, when no activation of training is held."""
        table, shape = self._table, self._shape
        if not shape.generate_rows:
            return np.zeros((), dtype=np.int64)
        kv_token_bytes = 2 * table.num_kv_heads * table.head_dim * shape.dtype_bytes
        if shape.side_reduction:
            kv_token_bytes += 2 * table.num_kv_heads * table.head_dim // shape.side_reduction * _FP32_BYTES
        # As many groups of rows as stages are in flight; a cache grows by copying one block's part of one group.
        group_rows = -(-shape.generate_rows // place.num_stages)
        tokens, group_tokens = shape.generate_rows * shape.generate_tokens, group_rows * shape.generate_tokens
        kv_bytes = kv_token_bytes * (tokens * num_blocks + group_tokens)
        logit_bytes = group_rows * table.vocab_size * 3 * _FP32_BYTES if place.is_last else 0
        return kv_bytes + group_tokens * self._generation_token_bytes + logit_bytes


def _prefix_sums(values: Sequence[int]) -> Ints:
    return np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(np.asarray(values, dtype=np.int64))])


def _range_maxima(values: Sequence[int]) -> Ints:
    """[start, end] -> the largest of values[start:end]; 0 where the range is empty."""
    num_values = len(values)
    if len(set(values)) == 1:
        return np.triu(np.full((num_values + 1, num_values + 1), values[0], dtype=np.int64), 1)
    maxima = np.zeros((num_values + 1, num_values + 1), dtype=np.int64)
    for start in range(num_values):
        maxima[start, start + 1 :] = np.maximum.accumulate(np.asarray(values[start:], dtype=np.int64))
    return maxima
