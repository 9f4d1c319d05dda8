"""What deep prompts share: trained keys and values before every row, in every block of a stage.

Joined over the stages they are the checkpoint that stock peft writes for PREFIX_TUNING. What is trained for them, and
how keys and values come of it, is the methods' own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import peft
import torch
from torch import Tensor

from edge_node.methods.base import TrainableParameter
from edge_node.methods.checkpoint import load_values
from edge_node.stage.past import KeyValue
from edge_node.stage.stage import Stage
from partitioner.model_sizes import key_value_shape
from plutino.errors import ConfigError
from plutino.key_value_layout import CHECKPOINT_KEY, block_name, columns_of

# Shape suffixes: P virtual tokens, K key heads, H head size, W = K H.


@dataclass(frozen=True, slots=True)
class KeyValueShape:
    """Sizes of the keys and values of one block."""

    num_tokens: int
    num_heads: int
    """Heads of the keys, of which attention may have fewer than of the queries."""
    head_size: int

    @property
    def width(self) -> int:
        """Numbers of one token's keys; values have as many."""
        return self.num_heads * self.head_size


def shape_in(stage: Stage, num_tokens: int) -> KeyValueShape:
    """The shape that this model's KV cache asks for."""
    return KeyValueShape(num_tokens, *key_value_shape(stage.config.to_dict(), stage.family))


class AttachedKeyValues:
    """Keys and values before the rows of one stage; see :class:`edge_node.methods.base.AttachedMethod`."""

    num_prompt_tokens = 0

    def __init__(
        self,
        stage: Stage,
        shape: KeyValueShape,
        encoders: Mapping[int, Callable[[], Tensor]],
        parameters: Iterable[TrainableParameter],
        peft_config: Mapping[str, Any],
    ) -> None:
        """``encoders`` give keys beside values, [P, 2 W] in fp32, of each of the stage's blocks."""
        self.parameters: tuple[TrainableParameter, ...] = tuple(sorted(parameters, key=lambda p: p.name))
        self._shape = shape
        self._encoders = dict(encoders)
        self._published: dict[int, Tensor] = {}
        self._is_enabled = True
        self._peft_config = dict(peft_config)
        self._device = stage.device
        stage.past = self

    @property
    def num_tokens(self) -> int:
        """Virtual tokens before every row; 0 while switched off."""
        return self._shape.num_tokens if self._is_enabled else 0

    def key_values(self) -> Sequence[KeyValue]:
        """Keys and values [K, P, H] of the stage's blocks."""
        tables = (self._published[b] if b in self._published else encode() for b, encode in self._encoders.items())
        shape = (self._shape.num_tokens, 2, self._shape.num_heads, self._shape.head_size)
        pairs = (table.view(shape).permute(1, 2, 0, 3) for table in tables)
        return [(pair[0], pair[1]) for pair in pairs]

    def set_enabled(self, enabled: bool) -> None:
        """Switch between the prompted model and exactly the base model."""
        self._is_enabled = enabled

    def state(self) -> dict[str, Tensor]:
        """What this stage trains: fp32 copies by global name."""
        return {p.name: p.uses[0][1].detach().to(torch.float32, copy=True) for p in self.parameters}

    @torch.no_grad()
    def derived(self) -> dict[str, Tensor]:
        """Columns of the checkpoint where they are not what is trained: fp32 copies by the blocks' names."""
        if {p.name for p in self.parameters} == set(map(block_name, self._encoders)):
            return {}
        return {block_name(block): encode().detach().clone() for block, encode in self._encoders.items()}

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor]) -> None:
        """Copy values into the stage's parameters, in place; names of other stages are ignored.

        A published checkpoint has no more than keys and values. Where something else is trained they stand in its
        place until that is loaded again.

        Raises:
            ConfigError: a name of this stage is missing, or a tensor has another shape; nothing was changed.
        """
        own = {p.name: p.uses[0][1] for p in self.parameters}
        if CHECKPOINT_KEY in state:
            columns = self._columns(state[CHECKPOINT_KEY])
            if not own.keys() <= {block_name(block) for block in columns}:
                self._published = {block: part.to(self._device, torch.float32) for block, part in columns.items()}
                return
            state = {block_name(block): part for block, part in columns.items()}
        load_values(
            own,
            {name: (name,) for name in own},
            state,
            advice="Set num_virtual_tokens and projection as they were when it was trained",
        )
        self._published = {}

    def peft_config(self) -> dict[str, Any]:
        """Content of adapter_config.json, the same on every stage."""
        return dict(self._peft_config)

    def _columns(self, table: Tensor) -> dict[int, Tensor]:
        num_blocks = int(self._peft_config["num_layers"])
        wanted = [self._shape.num_tokens, 2 * self._shape.width * num_blocks]
        if list(table.shape) != wanted:
            raise ConfigError(
                f"the adapter does not fit the method: {CHECKPOINT_KEY} has shape {list(table.shape)} instead of "
                f"{wanted}. Set num_virtual_tokens as it was when it was trained"
            )
        return {block: table[columns_of(block, 2 * self._shape.width)] for block in self._encoders}


def saved_config(stage: Stage, shape: KeyValueShape, *, encoder_hidden_size: int | None) -> dict[str, Any]:
    """Content of adapter_config.json as peft writes it for a prefix with an MLP of that size, or without one."""
    saved = peft.PrefixTuningConfig(
        task_type="CAUSAL_LM",
        inference_mode=True,
        num_virtual_tokens=shape.num_tokens,
        token_dim=shape.width,
        num_transformer_submodules=1,
        num_attention_heads=shape.num_heads,
        num_layers=stage.num_blocks,
        encoder_hidden_size=shape.width if encoder_hidden_size is None else encoder_hidden_size,
        prefix_projection=encoder_hidden_size is not None,
    )
    return {**saved.to_dict(), "peft_type": "PREFIX_TUNING"}
