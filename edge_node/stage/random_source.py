"""A model whose weights are drawn when they are asked for: what is measured does not depend on their values."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from edge_node.methods.seeding import seeded_generator
from edge_node.stage.architecture import build_meta_model, list_block_linears, parse_config
from plutino.families import family_of
from plutino.gptq_index import GptqFormat, gptq_format

_SPREAD = 0.02


class RandomSource:
    """Tensors of a model that exists nowhere; the same for the same seed and name, whoever asks.

    Args:
        config: content of config.json. Says it that the checkpoint is GPTQ, so are the tensors.
        seed: decides all values.
        dtype: what tensors are drawn in, as if they were stored so.
        device: where they are drawn.
    """

    def __init__(
        self,
        config: dict[str, Any],
        *,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | None = None,
    ) -> None:
        self._config = config
        self._seed = seed
        self._dtype = dtype
        self._device = device or torch.device("cpu")
        self._gptq = gptq_format(config)
        family = family_of(config["model_type"])
        meta = build_meta_model(parse_config(config), dtype=torch.float32, attention=family.attention)
        self._shapes = {name: tuple(p.shape) for name, p in meta.named_parameters(remove_duplicate=False)}
        if self._gptq is not None:
            for linear in list_block_linears(meta, family):
                self._shapes |= _gptq_shapes(linear, self._shapes.pop(f"{linear}.weight"), self._gptq)
        self.bytes_read = 0

    def config(self) -> dict[str, Any]:
        """See :class:`edge_node.stage.weights.TensorSource`."""
        return dict(self._config)

    def names(self) -> set[str]:
        """See :class:`edge_node.stage.weights.TensorSource`."""
        return set(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        """See :class:`edge_node.stage.weights.TensorSource`."""
        return self._shapes[name]

    def read(self, name: str, dtype: torch.dtype | None) -> Tensor:
        """See :class:`edge_node.stage.weights.TensorSource`."""
        shape = self._shapes[name]
        return self.read_rows(name, 0, shape[0] if shape else 1, dtype)

    def read_rows(self, name: str, start_row: int, end_row: int, dtype: torch.dtype | None) -> Tensor:
        """See :class:`edge_node.stage.weights.TensorSource`."""
        shape = (end_row - start_row, *self._shapes[name][1:])
        _, _, part = name.rpartition(".")
        if part in ("qweight", "qzeros", "g_idx") and self._gptq is not None:
            tensor = self._packed_part(part, shape, self._shapes[name])
        else:
            generator = seeded_generator(self._seed, name, start_row)
            spread = _SPREAD / 4 if part == "scales" and self._gptq is not None else _SPREAD
            tensor = self._normal(shape, generator).mul_(spread)
            if len(self._shapes[name]) == 1 and part == "weight":
                tensor += 1.0  # norms: around zero, nothing would come through
        self.bytes_read += tensor.nbytes
        return tensor if dtype is None else tensor.to(dtype)

    def _normal(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        if self._device.type == "cpu":
            return torch.randn(shape, dtype=self._dtype, generator=generator)
        on_device = torch.Generator(self._device).manual_seed(generator.initial_seed())
        return torch.randn(shape, dtype=self._dtype, device=self._device, generator=on_device)

    def _packed_part(self, part: str, shape: tuple[int, ...], whole: tuple[int, ...]) -> Tensor:
        if part != "g_idx":
            return torch.randint(-(2**31), 2**31, shape, dtype=torch.int32)
        assert self._gptq is not None
        size = whole[0] if self._gptq.group_size == -1 else self._gptq.group_size
        groups = torch.arange(whole[0]) // size
        return (groups.flip(0) if self._gptq.desc_act else groups).int()


def _gptq_shapes(linear: str, weight: tuple[int, ...], packing: GptqFormat) -> dict[str, tuple[int, ...]]:
    out_features, in_features = weight
    num_groups, per_word = packing.num_groups(in_features), packing.values_per_word
    return {
        f"{linear}.qweight": (in_features // per_word, out_features),
        f"{linear}.qzeros": (num_groups, out_features // per_word),
        f"{linear}.scales": (num_groups, out_features),
        f"{linear}.g_idx": (in_features,),
    }
