"""All methods, by the ``type`` of their config."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from edge_node.methods.adapters import attach_adapters
from edge_node.methods.base import AttachedMethod
from edge_node.methods.full import attach_full
from edge_node.methods.lora import attach_lora
from edge_node.methods.p_tuning_v2 import attach_p_tuning_v2
from edge_node.methods.parallel_adapters import attach_parallel_adapters
from edge_node.methods.prefix import attach_prefix
from edge_node.methods.prompt import attach_prompt
from edge_node.stage.stage import Stage


class Attach(Protocol):
    """Puts a method's trainable part on a stage, in place."""

    def __call__(self, stage: Stage, config: Any, *, seed: int) -> AttachedMethod:
        """Attach with initial values that depend on the seed and the parameters' global names alone.

        ``config`` is the one whose ``type`` the method is registered under.

        Raises:
            ConfigError: the config names what the model does not have.
        """


METHODS: Mapping[str, Attach] = {
    "adapters": attach_adapters,
    "full": attach_full,
    "lora": attach_lora,
    "p_tuning_v2": attach_p_tuning_v2,
    "prefix": attach_prefix,
    "parallel_adapters": attach_parallel_adapters,
    "prompt": attach_prompt,
}
