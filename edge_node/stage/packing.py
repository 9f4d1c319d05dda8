"""Puts packed layers into a stage that is still on the meta device, one tensor at a time.

Each matrix is read as it is stored, packed, and let go of before the next one is read: while a stage is built it holds
its packed tensors and one matrix. Where a cache of packed tensors is given, those are taken from there instead, to the
bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from edge_node.quantize.base import Scheme, check_packed
from edge_node.quantize.embedding import QuantEmbedding
from edge_node.quantize.gptq import Gptq
from edge_node.quantize.int8 import Int8
from edge_node.quantize.integer_product import check_integer_product
from edge_node.quantize.linear import QuantLinear
from edge_node.quantize.registry import scheme_of
from edge_node.stage.weights import TensorSource
from plutino.errors import ModelError, QuantizationError
from plutino.gptq_index import PARTS, GptqFormat, gptq_format, layer_shape
from plutino.job.model import Packing

FindStored = Callable[[str], str | None]
"""Name under which the checkpoint holds a parameter of the model, or None."""

_TILE_BYTES = 16 << 20
"""Stored bytes of embedding or head that are packed at once."""


class PackedCache(Protocol):
    """Packed tensors of one model's matrices that were made before."""

    def load(self, name: str, scheme: str) -> dict[str, Tensor] | None:
        """What :meth:`save` was given for this matrix, to the bit; None: nothing of it is left."""

    def holds(self, name: str, scheme: str) -> bool:
        """Whether :meth:`load` will probably give it; costs no reading."""

    def prepare(self, name: str, scheme: str) -> None:
        """:meth:`load` will be asked for this matrix, which :meth:`holds` has promised: begin to obtain it."""

    def save(self, name: str, scheme: str, packed: Mapping[str, Tensor]) -> None:
        """Keep packed tensors for the next job, if there is room."""


class StagePacker:
    """Replaces linear layers, and by option embedding and head, of a meta model.

    Args:
        source: the checkpoint.
        find_stored: how the checkpoint calls a parameter.
        packing: what is packed, and how.
        dtype: the stage's compute dtype.
        device: where packed tensors go.
        cache: packed tensors of earlier jobs; None: pack anew.

    Raises:
        ModelError: a GPTQ checkpoint is asked for and this is none, or the other way round.
    """

    def __init__(
        self,
        source: TensorSource,
        find_stored: FindStored,
        packing: Packing,
        *,
        dtype: torch.dtype,
        device: torch.device,
        cache: PackedCache | None,
    ) -> None:
        self._source = source
        self._find_stored = find_stored
        self._packing = packing
        self._dtype = dtype
        self._device = device
        self._cache = cache
        self._gptq: GptqFormat | None = gptq_format(source.config())
        if (self._gptq is not None) != (packing.scheme == "gptq"):
            raise ModelError(
                "the model is a GPTQ checkpoint; set model.quantization: gptq"
                if self._gptq is not None
                else "model.quantization: gptq needs a GPTQ checkpoint, and config.json names none; choose nf4 or int8"
            )
        self.names_read: list[str] = []
        """Stored tensors that were read, in order."""

    def stored_parts(self, linear: str) -> dict[str, str | None]:
        """Tensors that hold a linear's weight: part -> name in the checkpoint, None where it lacks one."""
        if self._gptq is not None and self._find_stored(f"{linear}.weight") is None:
            needed = PARTS if self._gptq.desc_act else PARTS[:3]
            parts = {part: self._find_stored(f"{linear}.{part}") for part in PARTS}
            return {part: name for part, name in parts.items() if name is not None or part in needed}
        return {"weight": self._find_stored(f"{linear}.weight")}

    def is_kept(self, name: str) -> bool:
        """Whether a parameter's packed form is probably in the cache, so that what is stored need not be obtained."""
        return self._kept_as(name) is not None

    def prepare(self, names: Iterable[str]) -> None:
        """Begin to obtain the packed form of these parameters, where :meth:`is_kept` says that there is one."""
        for name in names:
            if self._cache is not None and (kept := self._kept_as(name)) is not None:
                self._cache.prepare(*kept)

    def _kept_as(self, name: str) -> tuple[str, str] | None:
        """Name and scheme by which the cache knows a parameter's packed form; None: it has none."""
        linear, _, part = name.rpartition(".")
        if self._cache is None or part == "bias":
            return None
        known = [(linear, self._packing.scheme)] if self._packing.scheme != "none" else []
        if self._packing.embedding == "int8" or self._packing.head == "int8":
            # Rows of embedding and head, which where they are tied are known by what is stored.
            known.append((self._find_stored(name) or name, "int8"))
        return next((each for each in known if self._cache.holds(*each)), None)

    def pack_linears(self, model: PreTrainedModel, linears: Sequence[str]) -> None:
        """Put a packed layer in the place of each of these linears (or Conv1Ds) of a meta model.

        Everything that shapes can tell is checked for all of them before the first is read.

        Raises:
            ModelError: tensors are missing or of another shape.
            QuantizationError: the scheme cannot hold a layer.
        """
        if self._packing.scheme == "none":
            return
        fused = sorted(name for name, p in model.named_parameters() if p.dim() > 2)
        if fused:
            raise QuantizationError(
                f"{self._packing.scheme} cannot hold {fused[0]}, in which experts lie fused; "
                "set model.quantization: none"
            )
        work = [(name, self._scheme_for(name, model.get_submodule(name))) for name in linears]
        for name, scheme in work:
            if scheme is not None:
                self._pack_linear(model, name, scheme)

    def pack_outer(self, model: PreTrainedModel, embedding: str | None, head: str | None) -> None:
        """Put int8 in the place of the stage's embedding and head, where the packing asks for it."""
        shared: dict[str, dict[str, Tensor]] = {}
        if embedding is not None and self._packing.embedding == "int8":
            module = model.get_submodule(embedding)
            assert isinstance(module, nn.Embedding)
            packed = self._outer(f"{embedding}.weight", tuple(module.weight.shape), shared)
            made = QuantEmbedding(module.num_embeddings, module.embedding_dim, packed, dtype=self._dtype)
            scale = getattr(module, "scalar_embed_scale", None)
            if scale is not None:
                raise QuantizationError(
                    f"the embedding of {model.config.model_type} scales what it looks up, which int8 does not yet do; "
                    "set model.quantize_embedding: keep"
                )
            model.set_submodule(embedding, made)
        if head is not None and self._packing.head == "int8":
            module = model.get_submodule(head)
            assert isinstance(module, nn.Linear)
            packed = self._outer(f"{head}.weight", tuple(module.weight.shape), shared)
            bias = self._read_bias(head, module)
            linear = QuantLinear(
                Int8(), module.out_features, module.in_features, packed, bias, compute_dtype=self._dtype
            )
            model.set_submodule(head, linear)

    def _scheme_for(self, name: str, module: nn.Module) -> Scheme | None:
        """The scheme of one linear, its tensors checked; None: the checkpoint does not pack it."""
        out_features, in_features = matrix_shape(module)
        if self._gptq is None:
            scheme = scheme_of(self._packing.scheme)
            stored = self._find_stored(f"{name}.weight")
            assert stored is not None, "missing tensors were refused before"
            found = self._source.shape(stored)
            wanted = (in_features, out_features) if isinstance(module, Conv1D) else (out_features, in_features)
            if found != wanted:
                raise ModelError(
                    f"tensor {stored} has shape {list(found)} but config.json asks for {list(wanted)}; "
                    "config.json does not belong to these weights"
                )
            try:
                scheme.check(out_features, in_features)
            except QuantizationError as error:
                raise QuantizationError(f"{name} cannot be held in {scheme.name}: {error}") from error
            if self._packing.products == "integer":
                check_integer_product(out_features, in_features, self._device)
            return scheme
        parts = self.stored_parts(name)
        if "weight" in parts:
            return None
        shapes = {f"{name}.{part}": self._source.shape(stored) for part, stored in parts.items() if stored is not None}
        if layer_shape(name, shapes, self._gptq) != (out_features, in_features):
            found = layer_shape(name, shapes, self._gptq)
            raise ModelError(
                f"the GPTQ layer {name} holds {list(found)} weights but config.json asks for "
                f"{[out_features, in_features]}; bits or the sizes there do not belong to this checkpoint"
            )
        return Gptq(self._gptq)

    def _pack_linear(self, model: PreTrainedModel, name: str, scheme: Scheme) -> None:
        module = model.get_submodule(name)
        out_features, in_features = matrix_shape(module)
        packed = self._cached(name, scheme, (out_features, in_features))
        if packed is None:
            packed = self._pack_weight(name, scheme, is_transposed=isinstance(module, Conv1D))
            if self._cache is not None:
                self._cache.save(name, scheme.name, packed)
        bias = self._read_bias(name, module)
        linear = QuantLinear(
            scheme,
            out_features,
            in_features,
            packed,
            bias,
            compute_dtype=self._dtype,
            products=self._packing.products,
        )
        model.set_submodule(name, linear)

    def _pack_weight(self, name: str, scheme: Scheme, *, is_transposed: bool) -> dict[str, Tensor]:
        parts = {part: stored for part, stored in self.stored_parts(name).items() if stored is not None}
        self.names_read += parts.values()
        if isinstance(scheme, Gptq):
            stored = {part: self._source.read(stored, None) for part, stored in parts.items()}
            return {key: tensor.to(self._device) for key, tensor in scheme.repack(name, stored).items()}
        weight = self._source.read(parts["weight"], None).to(self._device)
        if is_transposed:
            weight = weight.t().contiguous()
        try:
            return scheme.pack(weight)
        except QuantizationError as error:
            raise QuantizationError(f"{name} cannot be held in {scheme.name}: {error}") from error

    def _outer(self, name: str, shape: tuple[int, ...], shared: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
        """int8 rows of the embedding or the head, packed tile by tile: rows are independent."""
        stored = self._find_stored(name)
        if stored is None:
            raise ModelError(f"the checkpoint lacks {name}; download it again")
        if self._source.shape(stored) != shape:
            raise ModelError(
                f"tensor {stored} has shape {list(self._source.shape(stored))} but config.json asks for {list(shape)}; "
                "config.json does not belong to these weights"
            )
        if stored in shared:
            return shared[stored]
        scheme, (num_rows, num_columns) = Int8(), shape
        packed = self._cached(stored, scheme, (num_rows, num_columns))
        if packed is None:
            packed = {
                key: torch.empty(part.shape, dtype=part.dtype, device=self._device)
                for key, part in scheme.layout(num_rows, num_columns).items()
            }
            step = max(1, _TILE_BYTES // (4 * num_columns))
            for start in range(0, num_rows, step):
                end = min(start + step, num_rows)
                tile = scheme.pack(self._source.read_rows(stored, start, end, None).to(self._device))
                for key, tensor in tile.items():
                    packed[key][start:end] = tensor
            self.names_read.append(stored)
            if self._cache is not None:
                self._cache.save(stored, scheme.name, packed)
        shared[stored] = packed
        return packed

    def _cached(self, name: str, scheme: Scheme, shape: tuple[int, int]) -> dict[str, Tensor] | None:
        packed = None if self._cache is None else self._cache.load(name, scheme.name)
        if packed is None:
            return None
        check_packed(scheme, *shape, packed)
        return {key: tensor.to(self._device) for key, tensor in packed.items()}

    def _read_bias(self, name: str, module: nn.Module) -> Tensor | None:
        if getattr(module, "bias", None) is None:
            return None
        stored = self._find_stored(f"{name}.bias")
        assert stored is not None, "missing tensors were refused before"
        self.names_read.append(stored)
        return self._source.read(stored, self._dtype).to(self._device)


def matrix_shape(module: nn.Module) -> tuple[int, int]:
    """(out, in) of a linear layer or of transformers' Conv1D."""
    if isinstance(module, Conv1D):
        return int(module.nf), int(module.weight.shape[0])
    assert isinstance(module, nn.Linear)
    return module.out_features, module.in_features
