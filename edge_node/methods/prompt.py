"""Prompt tuning on the first stage (Lester et al. 2021, arXiv:2104.08691): trained embeddings before each row's own.

The other stages hold nothing and see longer rows. The checkpoint is what stock peft writes for PROMPT_TUNING.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import peft
import torch
from torch import Tensor, nn

from edge_node.methods.base import TrainableParameter
from edge_node.methods.checkpoint import load_values, parameter_state
from edge_node.methods.seeding import seeded_generator
from edge_node.stage.stage import Stage
from plutino.errors import ConfigError
from plutino.job.method import PromptConfig

_KEY = "prompt_embeddings"
"""peft's key of the only tensor."""


class AttachedPrompt:
    """A prompt before the rows of one model; see :class:`edge_node.methods.base.AttachedMethod`."""

    def __init__(self, stage: Stage, num_tokens: int, embeddings: nn.Parameter | None, config: dict[str, Any]) -> None:
        self._stage = stage
        self._num_tokens = num_tokens
        self._is_enabled = True
        self._config = config
        self.parameters: tuple[TrainableParameter, ...] = ()
        if embeddings is not None:
            stage.prompt = embeddings
            self.parameters = (TrainableParameter(_KEY, (("block", embeddings),), ("block",)),)

    @property
    def num_prompt_tokens(self) -> int:
        """Virtual tokens before every row; 0 while switched off."""
        return self._num_tokens if self._is_enabled else 0

    def set_enabled(self, enabled: bool) -> None:
        """Switch between the prompted model and exactly the base model."""
        self._is_enabled = enabled

    def state(self) -> dict[str, Tensor]:
        """The prompt, on the first stage: an fp32 copy by peft's key."""
        return parameter_state(self.parameters)

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Copy the prompt's values, in place, where this stage holds it.

        Raises:
            ConfigError: it is missing, or of another shape; nothing was changed.
        """
        load_values(
            {p.name: p.uses[0][1] for p in self.parameters},
            {p.name: (p.name,) for p in self.parameters},
            state,
            advice="Set num_virtual_tokens as it was when it was trained",
        )

    def peft_config(self) -> dict[str, Any]:
        """Content of adapter_config.json, the same on every stage."""
        return dict(self._config)


def attach_prompt(stage: Stage, config: PromptConfig, *, seed: int) -> AttachedPrompt:
    """Put virtual tokens before the first stage's rows; the other stages learn how many there are.

    Args:
        stage: a stage without an adapter.
        config: the method's config, the same for every stage.
        seed: the job's seed; initial values depend on it, on the prompt's name and on the embedding alone.

    Raises:
        ConfigError: embeddings and hidden states differ in width, or the ids of the text to start from are missing.
    """
    embedding_width = int(getattr(stage.config, "word_embed_proj_dim", _width(stage)))
    if embedding_width != _width(stage):
        raise ConfigError(
            f"this model's embeddings are {embedding_width} wide and its hidden states {_width(stage)}: peft has no "
            "prompt for that; use method.type: lora"
        )
    embeddings = nn.Parameter(_initial(stage, config, seed)) if stage.is_first else None
    saved = peft.PromptTuningConfig(
        task_type="CAUSAL_LM",
        inference_mode=True,
        num_virtual_tokens=config.num_virtual_tokens,
        token_dim=_width(stage),
        num_transformer_submodules=1,
        num_attention_heads=int(stage.config.num_attention_heads),
        num_layers=stage.num_blocks,
    )
    # peft reads where a prompt started from only when it makes one.
    values = {**saved.to_dict(), "peft_type": "PROMPT_TUNING", "prompt_tuning_init": "RANDOM"}
    return AttachedPrompt(stage, config.num_virtual_tokens, embeddings, values)


@torch.no_grad()
def _initial(stage: Stage, config: PromptConfig, seed: int) -> Tensor:
    """Starting values [tokens, D] in fp32."""
    generator = seeded_generator(seed, _KEY)
    num_tokens = config.num_virtual_tokens
    if config.init == "random":
        return torch.randn(num_tokens, _width(stage), generator=generator).to(stage.device)
    if config.init == "vocabulary":
        ids = torch.randint(0, int(stage.config.vocab_size), (num_tokens,), generator=generator)
    else:
        if not config.init_token_ids:
            raise ConfigError(
                "method.init: text needs the token ids of init_text, which the coordinator makes; "
                "where there is none, give method.init_token_ids"
            )
        # Repeated or cut, as peft does.
        ids = torch.tensor([config.init_token_ids[i % len(config.init_token_ids)] for i in range(num_tokens)])
    embedding = stage.model.get_submodule(stage.embedding_name)
    return cast(Tensor, embedding(ids[None].to(stage.device)))[0].float().clone()


def _width(stage: Stage) -> int:
    return int(stage.config.hidden_size)
