"""What is asked of every method's config, and what those share that train inside the blocks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from typing import Any, ClassVar, TypeVar

from pydantic import Field, model_validator

from plutino.job.base import SpecPart
from plutino.job.blocks import Blocks, chosen_blocks
from plutino.key_value_layout import Float32Array

_Part = TypeVar("_Part", bound="MethodPart")


class MethodPart(SpecPart, ABC):
    """What is asked of every method's config."""

    size_setting: ClassVar[str]
    """The setting that the number of trained parameters grows with."""
    has_peft_format: ClassVar[bool] = True
    """Whether stock peft loads the checkpoint; plutino.load_adapter loads the others."""
    trains_weights: ClassVar[bool] = False
    """Whether the model's own weights are trained in place: unpacked, published as a whole model, and with no base
    left beside them."""
    saves_score_head: ClassVar[bool] = False
    """Whether the checkpoint has a place for a head that an objective trains."""

    @property
    def has_dropout(self) -> bool:
        """Whether the method's own layers drop anything in training."""
        return False

    @property
    def saves_tied_head(self) -> bool:
        """Whether the checkpoint repeats the trained embedding under the head's name."""
        return False

    @property
    def unpacks_weights(self) -> str:
        """The setting that needs whole frozen weights in each pass, which packed ones would undo; empty: none."""
        return ""

    @property
    def trains_outer_modules(self) -> bool:
        """Whether embedding or head themselves are trained, which packed ones cannot be."""
        return False

    @property
    def leaves_blocks_alone(self) -> bool:
        """Whether the model's blocks give the same whatever was trained, so that it can be kept."""
        return False

    def when_restored(self: _Part) -> _Part:
        """The same for a stage whose first values are overwritten at once: without those that cost something."""
        return self

    @property
    def prunes_by_gradients(self) -> bool:
        """Whether what is trained starts from gradients of the blocks, once, in the first step."""
        return False

    @property
    def prompt_tokens(self) -> int:
        """Virtual tokens before each row."""
        return 0

    @property
    def past_tokens(self) -> int:
        """Virtual tokens that have keys and values before each row, and no place in it."""
        return 0

    @property
    def no_continuation(self) -> str:
        """Why training cannot start from a published checkpoint, and the way out; empty: it can."""
        return ""

    def derived_names(self, adapter_config: Mapping[str, Any]) -> tuple[str, ...]:
        """What devices compute for the checkpoint, by name; empty: the checkpoint is what is trained.

        Args:
            adapter_config: content of adapter_config.json.
        """
        return ()

    def checkpoint_of(self, parts: Mapping[str, Float32Array]) -> dict[str, Float32Array]:
        """The checkpoint's tensors of what all stages hold."""
        return dict(parts)

    def parts_of(self, checkpoint: Mapping[str, Float32Array], parts: Collection[str]) -> dict[str, Float32Array]:
        """The named parts of a checkpoint; the reverse of :meth:`checkpoint_of`."""
        return {name: checkpoint[name] for name in parts}

    @property
    def unfreezing(self) -> Unfreezing | None:
        """When blocks begin to train; None: all in the first step."""
        return None

    @property
    def text(self) -> str:
        """What the method wants to know the token ids of; empty: nothing."""
        return ""

    def with_text_ids(self, token_ids: tuple[int, ...]) -> MethodPart:
        """The config for devices, which have no tokenizer, with the ids of :attr:`text`; itself if it has none."""
        return self

    def lowest_trained_block(self, num_blocks: int, embedding_names: Collection[str]) -> int | None:
        """The lowest block that a gradient has to reach; None if nothing below the head is trained.

        Args:
            num_blocks: blocks of the model.
            embedding_names: what embeddings are called, over all families; training one counts as block 0.

        Raises:
            ConfigError: the method names blocks that the model does not have.
        """
        return 0

    def may_freeze_blocks(self, embedding_names: Collection[str]) -> bool:
        """Whether the lowest blocks may train nothing and see nothing trained, so that what they give can be kept.

        How many they are, if any, :meth:`lowest_trained_block` says.
        """
        return False

    @abstractmethod
    def for_profile(self: _Part) -> _Part:
        """The same method for a model of three blocks, by which a device's seconds a block are measured."""


class Unfreezing(SpecPart):
    """Top-down unfreezing (gradual unfreezing of Howard and Ruder 2018, arXiv:1801.06146).

    Training begins with the highest blocks and what lies above them; every few steps the next ones join. A frozen
    parameter takes no gradient and no optimiser step, and no gradient is carried below the lowest unfrozen block.
    """

    every_steps: int = Field(ge=1)
    """Steps until the next blocks join."""
    blocks: int = Field(1, ge=1)
    """Blocks that train from the first step, and that join each time."""

    def lowest_block(self, step: int, num_blocks: int) -> int:
        """The lowest block that takes part in a step."""
        return max(0, num_blocks - self.blocks * (1 + step // self.every_steps))


class InBackbonePart(MethodPart):
    """What methods share that change the blocks' own computation."""

    unfreeze: Unfreezing | None = None
    """Train from the top down; None: all blocks from the start."""

    @model_validator(mode="after")
    def _unfreezing_counts_all_blocks(self) -> InBackbonePart:
        if self.unfreeze is not None and getattr(self, "blocks", None) is not None:
            raise ValueError("unfreeze counts all blocks from the top; leave blocks out")
        return self

    @property
    def unfreezing(self) -> Unfreezing | None:
        """See :class:`MethodPart`."""
        return self.unfreeze


class InChosenBlocksPart(MethodPart):
    """What methods share that train in blocks which the job may choose."""

    blocks: Blocks = None
    """Blocks that are trained in: [8, 9], 8-11 or last 4; None means all. The lowest one decides how far down gradients
    go, and what training.activation_cache can keep."""

    def lowest_trained_block(self, num_blocks: int, embedding_names: Collection[str]) -> int | None:
        """See :class:`MethodPart`."""
        return chosen_blocks(self.blocks, num_blocks)[0]

    def may_freeze_blocks(self, embedding_names: Collection[str]) -> bool:
        """See :class:`MethodPart`."""
        return self.blocks is not None and 0 not in (() if isinstance(self.blocks, str) else self.blocks)
