"""A frozen embedding whose rows are packed: each token's row is unpacked when it is looked up."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from edge_node.quantize.base import check_packed
from edge_node.quantize.int8 import Int8


class QuantEmbedding(nn.Module):
    """Rows of an int8 matrix [num_embeddings, embedding_dim], given in ``dtype``.

    Args:
        num_embeddings: rows.
        embedding_dim: columns.
        packed: the tensors of :class:`edge_node.quantize.int8.Int8`; kept, not copied.
        dtype: dtype of what is looked up.

    Raises:
        QuantizationError: the packed tensors are not those of such a matrix.
    """

    def __init__(
        self, num_embeddings: int, embedding_dim: int, packed: Mapping[str, Tensor], *, dtype: torch.dtype
    ) -> None:
        super().__init__()
        check_packed(Int8(), num_embeddings, embedding_dim, packed)
        self.num_embeddings = num_embeddings
        self.embedding_dim = embedding_dim
        self.dtype = dtype
        self.register_buffer("codes", packed["codes"])
        self.register_buffer("scales", packed["scales"])

    @property
    def packed(self) -> dict[str, Tensor]:
        """The scheme's tensors, the module's own."""
        return {"codes": self.get_buffer("codes"), "scales": self.get_buffer("scales")}

    def forward(self, input_ids: Tensor) -> Tensor:
        """int64 ids of any shape to [..., embedding_dim]: the fp32 products rounded once."""
        codes, scales = self.get_buffer("codes"), self.get_buffer("scales")
        return (codes[input_ids].float() * scales[input_ids].float().unsqueeze(-1)).to(self.dtype)

    def extra_repr(self) -> str:
        """Shape, as ``print(model)`` shows it."""
        return f"{self.num_embeddings}, {self.embedding_dim}, int8 to {self.dtype}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantEmbedding:
        """Move the packed tensors, but never cast them."""
        for name, tensor in self.packed.items():
            self.register_buffer(name, tensor.to(fn(tensor).device))
        return self
