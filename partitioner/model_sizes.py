"""Sizes of a model by the names that all families share, from config.json alone."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from plutino.errors import ModelError
from plutino.families import Family


class Sizes:
    """Sizes by the names of :attr:`plutino.families.Family.config_keys`, from config.json alone."""

    def __init__(self, config: Mapping[str, Any], family: Family) -> None:
        self.is_tied = family.is_tied(config)
        self._known: dict[str, int] = {}
        for name, keys in family.config_keys.items():
            default = family.size_defaults.get(name)
            value = first_of(config, keys, self.total(default) if isinstance(default, str) else default)
            if value is None and name in ("head_dim", "embedding"):
                value = self["hidden"] // self["heads"] if name == "head_dim" else self["hidden"]
            if type(value) is not int or value < 1:
                raise ModelError(
                    f"config.json gives {keys[0]} = {value!r}, a whole number from 1 is needed; mend config.json"
                )
            self._known[name] = value
        if family.fix_sizes is not None:
            family.fix_sizes(config, self._known)

    def __getitem__(self, name: str) -> int:
        match name:
            case "query":
                return self["heads"] * self["head_dim"]
            case "key":
                return self["kv_heads"] * self["head_dim"]
        return self._known[name]

    def get(self, name: str, default: int) -> int:
        """A size that not every family has."""
        return self._known.get(name, default)

    def total(self, sizes: str) -> int:
        """A sum such as "query+2key"."""
        terms = (re.fullmatch(r"(\d*)(\w+)", term) for term in sizes.split("+"))
        return sum(int(term[1] or 1) * self[term[2]] for term in terms if term)


def key_value_shape(config: Mapping[str, Any], family: Family) -> tuple[int, int]:
    """Heads and head size of the keys that a block's KV cache holds; values have the same.

    Raises:
        ModelError: a size is missing from the config.
    """
    sizes = Sizes(config, family)
    return sizes.get("cached_heads", sizes["kv_heads"]), sizes["head_dim"]


def model_sizes(config: Mapping[str, Any], family: Family) -> dict[str, int]:
    """Blocks, hidden, heads, kv_heads, head_dim and inner of a model, by these names.

    Raises:
        ModelError: config.json gives no such size.
    """
    sizes = Sizes(config, family)
    return {name: sizes[name] for name in ("blocks", "hidden", "heads", "kv_heads", "head_dim", "inner")}


def first_of(config: Mapping[str, Any], keys: Iterable[str], default: Any) -> Any:
    """What config.json has under the first of these keys; the default if it has none of them."""
    return next((config[key] for key in keys if config.get(key) is not None), default)
