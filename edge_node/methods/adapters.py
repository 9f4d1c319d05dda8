"""Bottleneck adapters on one stage (Houlsby et al. 2019, arXiv:1902.00751; Pfeiffer et al. 2020, arXiv:2005.00247).

Each sits on the output of a sublayer's last linear layer, before the residual sum; up starts at zero, so that the
adapted model starts as the base model. Layout and arithmetic are :mod:`plutino.load_adapter`'s, which also loads the
result: peft has no such method.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edge_node.methods.checkpoint import KEY_PREFIX, StoredAsTrained, in_blocks
from edge_node.methods.seeding import seeded_generator
from edge_node.stage.stage import Stage
from plutino.errors import ConfigError
from plutino.families import ATTENTION_OUTPUT, MLP_INNER
from plutino.job.blocks import chosen_blocks
from plutino.job.method import AdaptersConfig
from plutino.load_adapter import Bottleneck, BottleneckLayout, insert_bottleneck


class AttachedAdapters(StoredAsTrained):
    """Bottleneck adapters on one stage; see :class:`edge_node.methods.base.AttachedMethod`."""

    def __init__(self, bottlenecks: Mapping[str, Bottleneck], layout: BottleneckLayout) -> None:
        own = {key: p for layer, each in bottlenecks.items() for key, p in each.by_key(layer).items()}
        super().__init__(in_blocks(own), advice="Set placement, bottleneck and blocks as they were when it was trained")
        self._bottlenecks = tuple(bottlenecks.values())
        self._layout = layout

    def set_enabled(self, enabled: bool) -> None:
        """Switch between the adapted model and exactly the base model."""
        for bottleneck in self._bottlenecks:
            bottleneck.is_enabled = enabled

    def peft_config(self) -> dict[str, Any]:
        """Content of adapter_config.json for the whole model, the same on every stage."""
        return self._layout.model_dump(mode="json")


def attach_adapters(stage: Stage, config: AdaptersConfig, *, seed: int) -> AttachedAdapters:
    """Put adapters behind a stage's sublayers, in place. A stage where nothing is trained is fine.

    Args:
        stage: a stage without an adapter.
        config: the method's config, the same for every stage.
        seed: the job's seed; initial values depend on it and on global names alone.

    Raises:
        ConfigError: the model has no such blocks, or its family no layer to put an adapter behind.
    """
    layers = _adapted_layers(stage, config)
    layout = BottleneckLayout(
        placement=config.placement,
        bottleneck=config.bottleneck,
        activation=config.activation,
        width=int(stage.config.hidden_size),
        layers=layers,
        task_type="CAUSAL_LM" if stage.family.halves is None else "SEQ_2_SEQ_LM",
    )
    modules = dict(stage.model.named_modules())
    bottlenecks: dict[str, Bottleneck] = {}
    for layer in layers:
        if layer not in modules:
            continue
        bottlenecks[layer] = Bottleneck(
            layout.width,
            layout.bottleneck,
            layout.activation,
            device=stage.device,
            generator=seeded_generator(seed, f"{KEY_PREFIX}{layer}.adapter_down.weight"),
        )
        insert_bottleneck(modules[layer], bottlenecks[layer])
    return AttachedAdapters(bottlenecks, layout)


def _adapted_layers(stage: Stage, config: AdaptersConfig) -> tuple[str, ...]:
    """Global names of the adapted layers, over all stages, in the model's order."""
    family, num_encoder_blocks = stage.family, stage.num_encoder_blocks
    wanted = (ATTENTION_OUTPUT, MLP_INNER) if config.placement == "houlsby" else (MLP_INNER,)
    if not all(family.sublayer_outputs((read,)) for read in wanted):
        raise ConfigError(
            f"{family.model_type} has no MLP layer that an adapter could follow (its experts share one tensor); "
            "use method.type: lora"
        )
    return tuple(
        f"{family.block_name(block, num_encoder_blocks)}.{name}"
        for block in chosen_blocks(config.blocks, stage.num_blocks)
        for read in wanted
        for name in family.sublayer_outputs((read,), in_decoder=block >= num_encoder_blocks > 0)
    )
