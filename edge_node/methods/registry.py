"""All methods, by the ``type`` of their config."""

from __future__ import annotations

from typing import Protocol

from edge_node.methods.base import AttachedMethod
from edge_node.methods.lora import attach_lora
from edge_node.stage.build import Stage
from plutino.job.method import MethodConfig


class Attach(Protocol):
    """Puts a method's trainable part on a stage, in place."""

    def __call__(self, stage: Stage, config: MethodConfig, *, seed: int) -> AttachedMethod:
        """Attach with initial values that depend on the seed and the parameters' global names alone.

        Raises:
            ConfigError: the config names what the model does not have.
        """


METHODS: dict[str, Attach] = {"lora": attach_lora}
