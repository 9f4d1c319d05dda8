"""What a base model's config.json says where adapters' own configs leave it open."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from plutino.errors import ConfigError
from plutino.families import FAMILIES, Family


@dataclass(frozen=True, slots=True)
class AdaptedBase:
    """A base model that adapters belong to."""

    family: Family
    values: Mapping[str, Any]
    """Of config.json."""

    @property
    def writes_what_it_read(self) -> bool:
        """Whether it is an encoder-decoder."""
        return self.family.halves is not None

    @property
    def num_encoder_blocks(self) -> int:
        """Of an encoder-decoder; 0 for others."""
        return self.family.num_encoder_blocks(self.values)

    @property
    def num_heads(self) -> int | None:
        """As config.json has it."""
        keys = self.family.config_keys["heads"]
        return next((int(self.values[key]) for key in keys if self.values.get(key) is not None), None)


def read_base(folder: Path) -> AdaptedBase | None:
    """What config.json of a base model says; None: it is not on this machine yet, or of no family that is known."""
    try:
        values = json.loads((folder / "config.json").read_bytes())
    except OSError:
        return None
    except ValueError as error:
        raise ConfigError(f"{folder / 'config.json'} is not JSON: {error}; copy the model anew") from error
    family = FAMILIES.get(str(values.get("model_type"))) if isinstance(values, dict) else None
    return None if family is None else AdaptedBase(family, values)
