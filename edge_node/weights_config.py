"""What the owner of a device allows for weights; the agent hands it to its workers. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edge_node.cache import DEFAULT_BUDGET_BYTES, BlobCache, default_cache_dir


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightsConfig:
    """What the owner of a device allows; the agent hands it to its workers."""

    cache_dir: Path = field(default_factory=default_cache_dir)
    cache_bytes: int = DEFAULT_BUDGET_BYTES
    """Budget of the disk cache; 0 keeps nothing."""
    activation_dir: Path = field(default_factory=lambda: default_cache_dir().with_name("activations"))
    activation_bytes: int = 0
    """Budget of hidden states that jobs keep on the disk; 0 keeps none."""
    uses_folders: bool = True
    """Whether model folders of this device are read; not wanted where they are a slow network mount."""
    uses_hub: bool = True
    """Whether weights of hub models may be fetched from the hub; not wanted where its traffic is paid for."""

    def cache(self) -> BlobCache:
        """The device's cache."""
        return BlobCache(self.cache_dir, self.cache_bytes)

    def to_json(self) -> dict[str, Any]:
        """As :meth:`from_json` takes it."""
        return {
            "cache_dir": str(self.cache_dir),
            "cache_bytes": self.cache_bytes,
            "activation_dir": str(self.activation_dir),
            "activation_bytes": self.activation_bytes,
            "uses_folders": self.uses_folders,
            "uses_hub": self.uses_hub,
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> WeightsConfig:
        """What :meth:`to_json` gave."""
        known = cls()
        return cls(
            cache_dir=Path(values.get("cache_dir", known.cache_dir)),
            cache_bytes=int(values.get("cache_bytes", known.cache_bytes)),
            activation_dir=Path(values.get("activation_dir", known.activation_dir)),
            activation_bytes=int(values.get("activation_bytes", known.activation_bytes)),
            uses_folders=bool(values.get("uses_folders", known.uses_folders)),
            uses_hub=bool(values.get("uses_hub", known.uses_hub)),
        )
