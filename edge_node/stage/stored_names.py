"""Which stored tensors make up each parameter of a stage: published checkpoints differ from what transformers holds.

Prefixes are missing, heads are tied or have older names, experts are stored one by one. transformers' own conversion
(``transformers.conversion_mapping``) says what becomes what; it is asked with names and shapes, so that only the
stage's own tensors are ever read.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

from edge_node.stage.weights import TensorSource
from plutino.errors import ModelError
from plutino.families import Family
from plutino.gptq_index import PARTS


@dataclass(slots=True)
class Recipe:
    """How one parameter comes about."""

    name: str
    converter: WeightConverter | None = None
    """transformers' operations on the stored tensors; None: the only one is taken as it is."""
    pieces: list[tuple[str, str]] = field(default_factory=list)
    """Stored name and the converter's pattern that it matched, in the order in which they are merged."""

    @property
    def stored(self) -> tuple[str, ...]:
        """Names, as stored, of the tensors it is made of."""
        return tuple(name for name, _ in self.pieces)

    def shape(self, source: TensorSource) -> tuple[int, ...]:
        """Shape of the parameter, without reading anything.

        Raises:
            ModelError: the stored tensors do not fit each other.
        """
        return tuple(self._make(lambda name: torch.empty(source.shape(name), device="meta")).shape)

    def read(self, source: TensorSource, dtype: torch.dtype) -> Tensor:
        """The parameter, in memory of its own. While pieces are merged at most twice its size is held.

        Raises:
            ModelError: a stored tensor cannot be read, or they do not fit each other.
        """
        return self._make(lambda name: source.read(name, dtype))

    def _make(self, read: Callable[[str], Tensor]) -> Tensor:
        if self.converter is None:
            return read(self.pieces[0][0])
        converter = copy.deepcopy(self.converter)
        for stored, pattern in self.pieces:
            # Called one after the other by convert; its annotation knows of futures only.
            converter.add_tensor(self.name, stored, pattern, partial(read, stored))  # type: ignore[arg-type]
        try:
            made: dict[str, Any] = converter.convert(self.name)
        except (RuntimeError, ValueError) as error:
            raise ModelError(
                f"{len(self.pieces)} stored tensors, first {self.pieces[0][0]}, cannot be merged into {self.name}: "
                f"{error}; download the model again"
            ) from error
        if self.name not in made:
            raise ModelError(
                f"transformers makes {', '.join(made)} of {self.pieces[0][0]}, plutino wants {self.name}; save the "
                "model once with transformers' save_pretrained and use that folder"
            )
        tensor = made[self.name]
        return cast(Tensor, tensor[0] if isinstance(tensor, list) else tensor)


class StoredNames:
    """Which stored tensors each parameter of a stage comes from.

    Args:
        model: the stage, on the meta device.
        stored_names: names of all tensors of the checkpoint.
        family: the model's family.
        is_tied: head and token embedding are one parameter.
        copies: parameters of the stage that are copies of others -> those.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        stored_names: set[str],
        family: Family,
        *,
        is_tied: bool,
        copies: Mapping[str, str] | None = None,
    ) -> None:
        own = [name for name, _ in model.named_parameters(remove_duplicate=False)]
        ends = (family.embedding[0], family.head or family.embedding[0])
        # Of tied ends a checkpoint may keep either, whichever the stage holds; GPTQ holds a weight in several parts.
        weights = [name.removesuffix(".weight") for name in own if name.endswith(".weight")]
        copies = copies or {}
        packed = (f"{layer}.{part}" for layer in weights for part in PARTS)
        known = dict.fromkeys((*own, *ends, *copies.values(), *packed), True)
        self._recipes = _find_recipes(model, stored_names, known)
        self._recipes |= {own: self._recipes[other] for own, other in copies.items() if other in self._recipes}
        if is_tied:
            embedding, head = ends
            for end, other in ((embedding, head), (head, embedding)):
                if end not in self._recipes and other in self._recipes:
                    self._recipes[end] = self._recipes[other]

    def find(self, name: str) -> str | None:
        """Name under which the checkpoint holds a parameter, or the first of its pieces; None: it lacks it."""
        return self._recipes[name].stored[0] if name in self._recipes else None

    def pieces(self, name: str) -> tuple[str, ...]:
        """Names, as stored, of all tensors that a parameter is made of; empty: the checkpoint lacks it."""
        return self._recipes[name].stored if name in self._recipes else ()

    def recipe(self, name: str) -> Recipe:
        """How a parameter comes about that the checkpoint does not lack."""
        return self._recipes[name]


def _find_recipes(model: PreTrainedModel, stored_names: set[str], known: dict[str, bool]) -> dict[str, Recipe]:
    """Recipes of those known names that the checkpoint holds."""
    transforms = get_model_conversion_mapping(model)
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    found: dict[str, Recipe] = {}
    for stored in sorted(stored_names, key=dot_natural_key):
        name, pattern = rename_source_key(stored, renamings, converters, model.base_model_prefix, known)
        if name not in known and stored in known:
            name, pattern = stored, None
        if name not in known:
            continue  # another stage's, or a buffer that old checkpoints carry
        recipe = found.setdefault(name, Recipe(name, by_pattern[pattern] if pattern is not None else None))
        recipe.pieces.append((stored, pattern or stored))
    return found
