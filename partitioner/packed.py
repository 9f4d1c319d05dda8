"""Bytes of frozen weights that are held packed, with every constant counted, and the share that stays unpacked.

The formulas are those of the schemes in ``edge_node/quantize``; a test holds the two equal to the byte. Weights are
matrices of ``out_features`` x ``in_features``. Entry points: :func:`matrix_bytes`, :class:`WeightSizes`.
"""

from __future__ import annotations

from functools import cached_property

import numpy as np
import numpy.typing as npt

from partitioner.model import LinearShape, ModelTable
from partitioner.shape import JobShape
from plutino.errors import PlanError, QuantizationError
from plutino.gptq_index import GptqFormat
from plutino.job.model import Scheme

_FP32_BYTES = 4
_INT32_BYTES = 4

Ints = npt.NDArray[np.int64]

NF4_BLOCK = 64
"""Weights that share a scale (QLoRA, Dettmers et al. 2023, arXiv:2305.14314)."""
NF4_SCALE_BLOCK = 256
"""Scales that share a scale of their own."""
INT4_GROUP = 128
"""Inputs of one output that share a scale and a zero point."""

UNPACK_TILE_PARAMS = 1 << 24
"""Weights that are unpacked at once, unless one row has more."""
UNPACK_SCRATCH_BYTES = 4 << 20
"""What schemes need beside the unpacked tile, which they fill piece by piece."""
PACK_SCRATCH_BYTES = 32 << 20
"""What packing holds beside the matrix and its packed form: pieces of a million weights in fp32."""
CONVERSION_BYTES = 16 << 20
"""Stored bytes that are held while a tensor is converted to the compute dtype."""


def matrix_bytes(scheme: Scheme, out_features: int, in_features: int, *, gptq: GptqFormat | None = None) -> int:
    """Bytes of one packed matrix, its scales, zero points and tables included.

    Raises:
        PlanError: ``none`` packs nothing, or a GPTQ matrix comes without its format.
    """
    num_weights = out_features * in_features
    match scheme:
        case "int8":
            return num_weights + 2 * out_features
        case "nf4":
            num_blocks = -(-num_weights // NF4_BLOCK)
            return num_weights // 2 + num_blocks + _FP32_BYTES * -(-num_blocks // NF4_SCALE_BLOCK) + _FP32_BYTES
        case "int4":
            num_groups = out_features * (in_features // INT4_GROUP)
            return num_weights // 2 + 3 * num_groups
        case "gptq" if gptq is not None:
            num_scales = out_features * gptq.num_groups(in_features)
            order_bytes = 4 * in_features if gptq.desc_act else 0
            return num_weights * gptq.bits // 8 + 3 * num_scales + order_bytes
    raise PlanError(f"no packed size is known of scheme {scheme!r} for a {out_features} x {in_features} matrix")


class WeightSizes:
    """Bytes of a job's frozen weights, by parts of the model."""

    def __init__(self, table: ModelTable, shape: JobShape) -> None:
        """Sums over blocks are prepared once."""
        self._table, self._shape = table, shape
        self.packs_blocks = shape.packing.scheme != "none"
        packed_params = [sum(map(_num_weights, linears)) for linears in table.block_linears]
        packed_bytes = [sum(map(self._linear_bytes, linears)) for linears in table.block_linears]
        if not self.packs_blocks:
            packed_params = packed_bytes = [0] * table.num_blocks
        plain_params = [total - packed for total, packed in zip(table.block_params, packed_params, strict=True)]
        self._packed_params = _prefix_sums(packed_params)
        self._packed_bytes = _prefix_sums(packed_bytes)
        self._plain_params = _prefix_sums(plain_params)
        self._token_params = table.token_params
        self._int8_outer_bytes = matrix_bytes("int8", table.vocab_size, table.token_params // table.vocab_size)

    def plain_params(self, start_block: Ints, end_block: Ints, *, is_first: bool, is_last: bool) -> Ints:
        """Parameters of stages that are held in the compute dtype; arrays are broadcast against each other."""
        table, packing = self._table, self._shape.packing
        outside: int | Ints = 0
        if table.repeated_params:
            # The first block of either half has it anyway.
            has_own = (start_block == 0) | (start_block == table.num_encoder_blocks)
            outside = np.where(has_own, 0, table.repeated_params)
        if is_first:
            outside += table.embedding_params - (self._token_params if packing.embedding != "keep" else 0)
        if is_last:
            outside += table.final_params
            # A tied head is the embedding's own storage where the stage has both.
            outside += 0 if self._is_shared(is_first) or packing.head != "keep" else table.head_params
        return self._plain_params[end_block] - self._plain_params[start_block] + outside

    def packed_bytes(self, start_block: Ints, end_block: Ints, *, is_first: bool, is_last: bool) -> Ints:
        """Bytes of stages' packed weights."""
        num_outer = self._num_packed_outer(is_first, is_last)
        return self._packed_bytes[end_block] - self._packed_bytes[start_block] + num_outer * self._int8_outer_bytes

    def packed_params(self, start_block: Ints, end_block: Ints, *, is_first: bool, is_last: bool) -> Ints:
        """Parameters behind :meth:`packed_bytes`."""
        num_outer = self._num_packed_outer(is_first, is_last)
        return self._packed_params[end_block] - self._packed_params[start_block] + num_outer * self._token_params

    @property
    def unpacked_share(self) -> float:
        """Share of the whole model's parameters that no scheme packs."""
        table = self._table
        total = sum(table.block_params) + table.embedding_params + table.final_params
        total += 0 if table.is_tied else table.head_params
        start, end = np.asarray(0), np.asarray(table.num_blocks)
        plain = int(self.plain_params(start, end, is_first=True, is_last=True))
        return plain / total

    def workspace_bytes(self, *, is_last: bool) -> int:
        """Bytes of the buffer that matrices are unpacked into, a tile at a time, or of integer products' operands."""
        table, shape = self._table, self._shape
        matrices = [linear for linears in table.block_linears for linear in linears] if self.packs_blocks else []
        sizes = [(_num_weights(linear), linear.in_features) for linear in matrices]
        product_bytes = 0
        if shape.packing.products == "integer":
            # Rounded activations and the sums of their products, for all tokens at once; no weight is unpacked.
            num_tokens = max(shape.micro_batch_rows * shape.row_tokens, shape.generate_rows * shape.generate_tokens)
            product_bytes = num_tokens * max(one.in_features + _INT32_BYTES * one.out_features for one in matrices)
            sizes = []
        if is_last and shape.packing.head != "keep" and table.head_params:
            sizes.append((self._token_params, table.hidden_size))
        if not sizes:
            return product_bytes + (UNPACK_SCRATCH_BYTES if product_bytes else 0)
        tile_bytes = min(max(size for size, _ in sizes), UNPACK_TILE_PARAMS) * shape.dtype_bytes
        # The gradients that several tiles give are added up in fp32, each beside the next one.
        tiled_inputs = max((inputs for size, inputs in sizes if size > UNPACK_TILE_PARAMS), default=0)
        sum_bytes = shape.micro_batch_rows * shape.row_tokens * tiled_inputs * (_FP32_BYTES + shape.dtype_bytes)
        return product_bytes + tile_bytes + sum_bytes + UNPACK_SCRATCH_BYTES

    def reading_bytes(self) -> int:
        """Bytes that stand beside the stage while it is built: what is read, and what packing or converting adds."""
        merging_bytes = self._table.merged_params * self._shape.dtype_bytes
        if not self.packs_blocks:
            return CONVERSION_BYTES + merging_bytes
        stored_bytes = self._largest_matrix_params * _FP32_BYTES
        return max(CONVERSION_BYTES + merging_bytes, stored_bytes) + PACK_SCRATCH_BYTES

    def _is_shared(self, is_first: bool) -> bool:
        """Whether the last stage's head is the first stage's embedding, in one place and held alike."""
        packing = self._shape.packing
        return self._table.is_tied and is_first and packing.embedding == packing.head

    def _num_packed_outer(self, is_first: bool, is_last: bool) -> int:
        packing = self._shape.packing
        has_embedding = is_first and packing.embedding != "keep"
        has_head = is_last and packing.head != "keep" and self._table.head_params > 0 and not self._is_shared(is_first)
        return has_embedding + has_head

    @cached_property
    def _largest_matrix_params(self) -> int:
        if not self.packs_blocks:
            return 0
        return max((_num_weights(linear) for linears in self._table.block_linears for linear in linears), default=0)

    def _linear_bytes(self, linear: LinearShape) -> int:
        scheme = self._shape.packing.scheme
        if scheme == "none":
            return 0
        return matrix_bytes(scheme, linear.out_features, linear.in_features, gptq=self._table.gptq)


def _num_weights(linear: LinearShape) -> int:
    return linear.in_features * linear.out_features


def _prefix_sums(values: list[int]) -> Ints:
    return np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(np.asarray(values, dtype=np.int64))])


def check_scheme(table: ModelTable, scheme: Scheme) -> None:
    """Refuse a scheme that cannot hold the model's linear layers.

    Raises:
        QuantizationError: which layer, its sizes, and the way out.
    """
    if (scheme == "gptq") != (table.gptq is not None):
        raise QuantizationError(
            "the model is a GPTQ checkpoint; set model.quantization: gptq"
            if table.gptq is not None
            else "model.quantization: gptq needs a GPTQ checkpoint, and config.json names none; choose nf4 or int8"
        )
    if scheme != "none" and table.expert_blocks:
        raise QuantizationError(
            f"{scheme} cannot hold the {table.num_experts} experts of {table.family}, whose weights lie fused in one "
            f"tensor a block ({len(table.expert_blocks)} blocks); set model.quantization: none"
        )
    for index, linears in enumerate(table.block_linears):
        for linear in linears:
            problem = _problem(scheme, linear)
            if problem is not None:
                raise QuantizationError(
                    f"{scheme} cannot hold {linear.name} of block {index}, {linear.out_features} x "
                    f"{linear.in_features}: {problem}; choose int8"
                )


def _problem(scheme: Scheme, linear: LinearShape) -> str | None:
    if scheme == "int4" and linear.in_features % INT4_GROUP:
        return f"groups of {INT4_GROUP} do not divide its {linear.in_features} inputs"
    if scheme == "nf4" and _num_weights(linear) % 2:
        return "two weights share a byte, and it has an odd number"
    return None
