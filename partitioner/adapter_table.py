"""What a method adds to a model, in numbers."""

from __future__ import annotations

from typing import Any

from partitioner.values import PlanValue


class BlockAdapter(PlanValue):
    """What a method adds to one block."""

    params: int
    """Trainable parameters."""
    rank_sum: int
    """Numbers a token that the method's own layers keep for the backward pass: with LoRA the sum of the ranks."""
    cast_params: int = 0
    """Trained numbers of which the backward pass keeps a copy in a narrower compute dtype, a micro-batch each."""
    kept_numbers: int = 0
    """fp32 numbers that the method keeps for the backward pass, a micro-batch each, however long the rows are."""
    linears: tuple[str, ...]
    """Dotted names, inside the block, of the linears whose input is kept for the method's sake."""


class AdapterTable(PlanValue):
    """What a method adds to a model; the fields of a JobShape come from here."""

    blocks: tuple[BlockAdapter, ...]
    first_params: int
    """Trainable parameters of the embedding, or before it."""
    last_params: int
    """Trainable parameters of the head."""
    stage_params: int = 0
    """Trainable parameters that all blocks use: every stage holds them."""
    tied_params: int = 0
    """Trainable parameters that embedding and head share: first and last stage hold them both."""
    past_tokens: int = 0
    """Virtual tokens whose keys and values stand before each row in every block."""
    trains_weights: bool = False
    use_dora: bool = False
    size_setting: str
    """The setting that all of them grow with."""
    side_reduction: int = 0
    """See :attr:`partitioner.model.JobShape.side_reduction`."""
    side_has_whole_heads: bool = False
    prunes_by_gradients: bool = False

    @property
    def num_params(self) -> int:
        """All trainable parameters, each counted once."""
        ends = self.first_params + self.last_params - self.tied_params
        return sum(block.params for block in self.blocks) + ends + self.stage_params

    @property
    def shape_fields(self) -> dict[str, Any]:
        """The fields of :class:`partitioner.model.JobShape` that a method decides, by name."""
        return {
            "adapter_params": tuple(block.params for block in self.blocks),
            "adapter_rank_out": tuple(block.rank_sum for block in self.blocks),
            "adapter_cast_params": tuple(block.cast_params for block in self.blocks),
            "adapter_kept_numbers": tuple(block.kept_numbers for block in self.blocks),
            "trains_weights": self.trains_weights,
            "past_tokens": self.past_tokens,
            "adapted_linears": tuple(block.linears for block in self.blocks),
            "first_trainable_params": self.first_params,
            "last_trainable_params": self.last_params,
            "stage_trainable_params": self.stage_params,
            "tied_trainable_params": self.tied_params,
            "use_dora": self.use_dora,
            "size_setting": self.size_setting,
            "side_reduction": self.side_reduction,
            "side_has_whole_heads": self.side_has_whole_heads,
            "prunes_by_gradients": self.prunes_by_gradients,
        }
