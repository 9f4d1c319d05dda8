"""gptq: the weights of a published GPTQ checkpoint, held as they are stored and given back exactly.

The checkpoint's format stands in :mod:`plutino.gptq_index`. Held are the same codes, turned so that rows are outputs,
and the zero points as whole bytes with format v1's offset already added.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from edge_node.quantize.base import PackedTensor
from edge_node.quantize.workspace import scratch_elements, workspace
from plutino.errors import QuantizationError
from plutino.gptq_index import GptqFormat

_WAY_OUT = "download the model again, or use the unquantised model"


# Shape suffixes: O out features, I in features, G groups, P values in one int32.
@dataclass(frozen=True, slots=True)
class Gptq:
    """W[o, i] = scales[o, g] * (code[o, i] - zeros[o, g]) with g the group of input i."""

    packing: GptqFormat
    name: Literal["gptq"] = "gptq"

    def check(self, out_features: int, in_features: int) -> None:
        """Words and groups must be whole."""
        per_word, group_size = self.packing.values_per_word, self.packing.group_size
        if out_features % per_word or in_features % per_word:
            raise QuantizationError(
                f"a [{out_features}, {in_features}] weight does not fill words of {per_word} values; {_WAY_OUT}"
            )
        if group_size != -1 and in_features % group_size:
            raise QuantizationError(
                f"group_size {group_size} does not divide {in_features} inputs; config.json does not belong to this "
                f"checkpoint: {_WAY_OUT}"
            )

    def layout(self, out_features: int, in_features: int) -> dict[str, PackedTensor]:
        """Codes of ``bits``, per group an fp16 scale and a byte; with desc_act the group of every input."""
        num_groups = self.packing.num_groups(in_features)
        tensors = {
            "codes": PackedTensor(torch.uint8, (out_features, in_features * self.packing.bits // 8)),
            "scales": PackedTensor(torch.float16, (out_features, num_groups)),
            "zeros": PackedTensor(torch.uint8, (out_features, num_groups)),
        }
        if self.packing.desc_act:
            tensors["groups"] = PackedTensor(torch.int32, (in_features,))
        return tensors

    def row_multiple(self, in_features: int) -> int:
        """Rows are independent."""
        return 1

    def pack(self, weight: Tensor) -> dict[str, Tensor]:
        """GPTQ needs calibration data, which a device does not have.

        Raises:
            QuantizationError: always.
        """
        raise QuantizationError(
            f"a [{weight.shape[0]}, {weight.shape[1]}] weight cannot be quantised by GPTQ here: that takes calibration "
            "data; quantise the model beforehand, or choose nf4"
        )

    def unpack(self, packed: Mapping[str, Tensor], out: Tensor, *, start_row: int = 0) -> Tensor:
        """Dequantise rows from ``start_row`` on; see :class:`edge_node.quantize.base.Scheme`.

        Exact in fp32: a scale of 11 bits times a difference of 9 bits. Rounded once where ``out`` is narrower.
        """
        piece_rows = max(1, scratch_elements(out.device) // out.shape[1])
        for start in range(0, len(out), piece_rows):
            self._unpack_rows(packed, out[start : start + piece_rows], start_row + start)
        return out

    def _unpack_rows(self, packed: Mapping[str, Tensor], out: Tensor, start_row: int) -> None:
        rows = slice(start_row, start_row + len(out))
        values_OI = out
        if out.dtype != torch.float32:
            values_OI = workspace("values", out.numel(), torch.float32, out.device).view(out.shape)
        codes = packed["codes"][rows]
        if self.packing.bits == 4:
            pairs = values_OI.unflatten(1, (-1, 2))
            pairs[..., 0].copy_(codes & 15)
            pairs[..., 1].copy_(codes >> 4)
        else:
            values_OI.copy_(codes)
        scales_OG, zeros_OG = packed["scales"][rows], packed["zeros"][rows]
        if self.packing.desc_act:
            groups_I = packed["groups"]
            values_OI.sub_(zeros_OG.index_select(1, groups_I)).mul_(scales_OG.index_select(1, groups_I))
        else:
            values_OG_ = values_OI.unflatten(1, (scales_OG.shape[1], -1))
            values_OG_.sub_(zeros_OG.unsqueeze(2)).mul_(scales_OG.unsqueeze(2))
        if values_OI is not out:
            out.copy_(values_OI)

    @torch.no_grad()
    def repack(self, layer: str, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Packed tensors of one layer from the checkpoint's.

        Args:
            layer: the layer's name, for messages.
            stored: qweight, qzeros, scales and, if there is one, g_idx, of the shapes that
                :func:`plutino.gptq_index.layer_shape` checks.

        Raises:
            QuantizationError: groups that contradict config.json, or scales that fp16 does not hold.
        """
        num_groups, out_features = stored["scales"].shape
        scales_GO = stored["scales"].to(torch.float16)
        if (
            not torch.equal(scales_GO.to(torch.float64), stored["scales"].to(torch.float64))
            or not scales_GO.isfinite().all()
        ):
            raise QuantizationError(
                f"{layer}.scales holds {stored['scales'].dtype} values that fp16 does not hold exactly; {_WAY_OUT}"
            )
        # A word's bytes from the lowest on hold its values in order: exactly the order of inputs.
        codes = stored["qweight"].t().contiguous().view(torch.uint8)
        zero_bytes = stored["qzeros"].contiguous().view(torch.uint8)
        if self.packing.bits == 4:
            zeros_GO = torch.stack([zero_bytes & 15, zero_bytes >> 4], dim=-1).reshape(num_groups, out_features)
        else:
            zeros_GO = zero_bytes.clone()
        # Format v1 stores zero - 1, and 0 - 1 wraps around.
        zeros_GO.add_(self.packing.zero_offset).bitwise_and_((1 << self.packing.bits) - 1)
        packed = {"codes": codes, "scales": scales_GO.t().contiguous(), "zeros": zeros_GO.t().contiguous()}
        groups_I = stored.get("g_idx")
        if groups_I is not None:
            self._check_groups(layer, groups_I, num_groups)
        if self.packing.desc_act:
            assert groups_I is not None, "its presence was checked with the shapes"
            packed["groups"] = groups_I.to(torch.int32, copy=True)
        return packed

    def _check_groups(self, layer: str, groups_I: Tensor, num_groups: int) -> None:
        lowest, highest = (int(value) for value in torch.aminmax(groups_I))
        if lowest < 0 or highest >= num_groups:
            raise QuantizationError(
                f"{layer}.g_idx names groups {lowest} to {highest}, the layer has {num_groups}; {_WAY_OUT}"
            )
        if self.packing.desc_act:
            return
        in_features = len(groups_I)
        group_size = in_features if self.packing.group_size == -1 else self.packing.group_size
        if not torch.equal(groups_I.long(), torch.arange(in_features) // group_size):
            raise QuantizationError(
                f"{layer}.g_idx is not in the order of inputs, though quantization_config says desc_act: false; "
                f"set desc_act to true in config.json if the checkpoint was made with it, or {_WAY_OUT}"
            )
