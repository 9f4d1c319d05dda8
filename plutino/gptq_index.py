"""GPTQ checkpoints as they are published: what config.json says of them, and whether their tensors agree.

GPTQ (Frantar et al. 2022, arXiv:2210.17323) rounds each linear layer against calibration data. AutoGPTQ, GPTQModel and
others store a layer ``X`` of ``out`` x ``in`` weights, with P = 32 / bits values in an int32, as

    X.qweight  [in / P, out]        values along ``in``, lowest bits first
    X.qzeros   [groups, out / P]    zero points along ``out``; format v1 stores them minus 1
    X.scales   [groups, out]        fp16
    X.g_idx    [in]                 group of each input; without desc_act i // group_size

and weight[o, i] = scales[g, o] * (q[i, o] - zero[g, o]) with g = g_idx[i]. Everything here works on shapes, so that a
broken checkpoint is refused before any weight is read.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from plutino.errors import ModelError
from plutino.job.base import SpecPart

PARTS = ("qweight", "qzeros", "scales", "g_idx")
"""Tensors of one packed layer, by the last part of their names; the last may be missing where it is regular."""

_SUPPORTED_BITS = (4, 8)
_WAY_OUT = "download the model again, or use the unquantised model"

Shape = tuple[int, ...]


class GptqFormat(SpecPart):
    """How a checkpoint's layers are packed."""

    bits: int
    group_size: int
    """Inputs that share a scale; -1: all inputs of an output."""
    desc_act: bool
    """Inputs were quantised in the order of their activations, so that groups lie scattered."""
    zero_offset: int
    """What is added to stored zero points: 1 in format v1, 0 in v2."""

    @property
    def values_per_word(self) -> int:
        """Values in one int32."""
        return 32 // self.bits

    def num_groups(self, in_features: int) -> int:
        """Groups of a layer."""
        return 1 if self.group_size == -1 else -(-in_features // self.group_size)


def gptq_format(config: Mapping[str, Any]) -> GptqFormat | None:
    """How a checkpoint is packed, from the values of its config.json; None: it is not quantised.

    Raises:
        ModelError: it is quantised in a way that plutino does not read.
    """
    values = config.get("quantization_config")
    if values is None:
        return None
    method = values.get("quant_method") if isinstance(values, Mapping) else None
    if method != "gptq":
        raise ModelError(
            f"the model is stored quantised by {method!r}; plutino reads gptq: use the unquantised model with "
            "model.quantization: nf4 or int8"
        )
    bits, group_size = values.get("bits"), values.get("group_size")
    if bits not in _SUPPORTED_BITS:
        raise ModelError(f"the GPTQ checkpoint has {bits!r} bits a weight; plutino reads 4 and 8: use such a one")
    if type(group_size) is not int or (group_size != -1 and group_size < 1):
        raise ModelError(
            f"quantization_config gives group_size {group_size!r}; a whole number from 1, or -1, is needed"
        )
    if values.get("dynamic"):
        raise ModelError(
            "the GPTQ checkpoint has other bits or groups for some layers (quantization_config.dynamic), which plutino "
            "does not read; use one without"
        )
    checkpoint_format = values.get("checkpoint_format", "gptq")
    if checkpoint_format not in ("gptq", "gptq_v2"):
        raise ModelError(f"the GPTQ checkpoint is in the format {checkpoint_format!r}; plutino reads gptq and gptq_v2")
    return GptqFormat(
        bits=bits,
        group_size=group_size,
        desc_act=bool(values.get("desc_act", False)),
        zero_offset=0 if checkpoint_format == "gptq_v2" else 1,
    )


def unpacked_shapes(shapes: Mapping[str, Shape], packing: GptqFormat) -> dict[str, Shape]:
    """Shapes of the model's tensors as if nothing were packed: ``X.weight`` [out, in] for each packed layer.

    Raises:
        ModelError: a packed layer's tensors are missing or contradict each other or config.json.
    """
    packed = {name.removesuffix(".qweight") for name in shapes if name.endswith(".qweight")}
    if not packed:
        raise ModelError(f"config.json speaks of a GPTQ checkpoint, but no tensor is a qweight; {_WAY_OUT}")
    strays = {layer for layer in map(_layer_of_part, shapes) if layer is not None and layer not in packed}
    if strays:
        raise ModelError(f"the GPTQ layer {min(strays)} lacks its qweight; {_WAY_OUT}")
    plain = {name: shape for name, shape in shapes.items() if name.rpartition(".")[0] not in packed or _is_bias(name)}
    return plain | {f"{layer}.weight": layer_shape(layer, shapes, packing) for layer in packed}


def layer_shape(layer: str, shapes: Mapping[str, Shape], packing: GptqFormat) -> tuple[int, int]:
    """(out, in) of one packed layer, every tensor of it checked.

    Raises:
        ModelError: a tensor is missing or has a shape that contradicts the others or config.json.
    """
    missing = [part for part in PARTS[:3] if f"{layer}.{part}" not in shapes]
    if packing.desc_act and f"{layer}.g_idx" not in shapes:
        missing.append("g_idx")
    if missing:
        raise ModelError(f"the GPTQ layer {layer} lacks {', '.join(missing)}; {_WAY_OUT}")
    qweight = shapes[f"{layer}.qweight"]
    if len(qweight) != 2:
        raise ModelError(f"{layer}.qweight has shape {list(qweight)}, a matrix is needed; {_WAY_OUT}")
    per_word = packing.values_per_word
    in_features, out_features = qweight[0] * per_word, qweight[1]
    if out_features % per_word:
        raise ModelError(
            f"the GPTQ layer {layer} has {out_features} outputs, which {packing.bits}-bit zero points in words of "
            f"{per_word} cannot hold; {_WAY_OUT}"
        )
    if packing.group_size != -1 and in_features % packing.group_size:
        raise ModelError(
            f"group_size {packing.group_size} of quantization_config does not divide the {in_features} inputs of "
            f"{layer}; config.json does not belong to this checkpoint, or bits is wrong there"
        )
    num_groups = packing.num_groups(in_features)
    wanted = {
        "qzeros": (num_groups, out_features // per_word),
        "scales": (num_groups, out_features),
        "g_idx": (in_features,),
    }
    for part, shape in wanted.items():
        found = shapes.get(f"{layer}.{part}", shape)
        if tuple(found) != shape:
            raise ModelError(
                f"{layer}.{part} has shape {list(found)}; {in_features} inputs in groups of {packing.group_size} and "
                f"{out_features} outputs at {packing.bits} bits ask for {list(shape)}: config.json does not belong to "
                "this checkpoint, or it is broken"
            )
    return out_features, in_features


def _layer_of_part(name: str) -> str | None:
    layer, _, part = name.rpartition(".")
    return layer if part in ("qzeros", "g_idx") else None


def _is_bias(name: str) -> bool:
    return name.endswith(".bias")
