"""What a job asks of a pipeline, in sizes."""

from __future__ import annotations

from typing import Literal

from partitioner.values import PlanValue
from plutino.data.cutting import spare_labels
from plutino.job.model import PLAIN, Packing
from plutino.types import SumDtype


class JobShape(PlanValue):
    """What a job asks of a pipeline at its worst step."""

    dtype: Literal["fp32", "bf16"]
    packing: Packing = PLAIN
    """How the frozen weights are held."""
    is_on_cards: bool = False
    """Every device computes on a card, whose memory the budgets are about: what waits for the network or is on its way
    to the coordinator lies in the host's memory then."""
    runs_ahead: bool = False
    """Forward passes run one micro-batch further ahead for each boundary behind a stage, so that nobody waits for what
    is on its way; each holds one micro-batch's activations more."""
    batch_rows: int
    micro_batch_rows: int
    rows_per_sample: int = 1
    """Rows that stay in one micro-batch: 2 for preference pairs."""
    row_tokens: int
    """Padded length of the longest row; of an encoder-decoder's row source and target together."""
    source_tokens: int = 0
    """Tokens of an encoder-decoder's longest source; 0: as long as the longest row."""
    label_tokens: int
    """Largest number of label tokens in one micro-batch: the head computes logits for these only."""
    may_cut_by_tokens: bool = False
    """Micro-batches may have more rows than ``micro_batch_rows``, shorter ones; see :mod:`plutino.data.cutting`."""
    adapter_params: tuple[int, ...]
    """Trainable parameters in each block."""
    first_trainable_params: int = 0
    """Trainable parameters of the first stage outside the blocks (embedding)."""
    last_trainable_params: int = 0
    """Trainable parameters of the last stage outside the blocks (head)."""
    stage_trainable_params: int = 0
    """Trainable parameters that every stage holds, because all blocks use them."""
    tied_trainable_params: int = 0
    """Of those of the first and of the last stage, what both hold: an embedding that is the head as well."""
    adapter_rank_out: tuple[int, ...] = ()
    """Per block: numbers a token that the method's own layers keep for the backward pass (LoRA: the ranks' sum)."""
    adapter_cast_params: tuple[int, ...] = ()
    """Per block: trained numbers of which the backward pass keeps a copy in a compute dtype narrower than fp32."""
    adapted_linears: tuple[tuple[str, ...], ...] = ()
    """Per block: names of its adapted linears, whose inputs are kept for the backward pass; empty means all linears
    of every block that has adapter parameters."""
    adapter_kept_numbers: tuple[int, ...] = ()
    """Per block: fp32 numbers that the method keeps for the backward pass, however long the rows are."""
    past_tokens: int = 0
    """Virtual tokens whose keys and values stand before each row in every block."""
    trains_weights: bool = False
    """The weights themselves are trained: what is trained needs no value beside them."""
    use_dora: bool = False
    size_setting: str = "rank"
    """The method's setting that all of its sizes grow with."""
    side_reduction: int = 0
    """A side network of the blocks' own kind, this much narrower, is trained beside the blocks, which keep nothing for
    a backward pass then; 0: there is none."""
    side_has_whole_heads: bool = False
    """Its heads are fewer, and not narrower."""
    prunes_by_gradients: bool = False
    """Once, before the first step, micro-batches go backward through the blocks that it follows, one at a time."""
    cached_steps_share: float = 0.0
    """Steps that train from the activation cache, without the blocks, for each one that runs through them."""
    cached_ways: tuple[Literal["stages", "data-parallel"], ...] = ("stages", "data-parallel")
    """Ways that such steps may take; see :class:`partitioner.plan.CachedStep`."""
    frozen_share: float = 1.0
    """Share of the steps in which blocks below the lowest trained one run; the others have what they give cached."""
    entry_token_bytes: int = 0
    """Bytes of one token at one place of the model in the activation cache."""
    has_dropout: bool = False
    checkpointing: Literal["auto", "on", "off"] = "auto"
    codec: Literal["raw", "bf16"] = "raw"
    """Of every boundary between stages that bf16_borders does not name."""
    bf16_borders: tuple[int, ...] = ()
    """Block borders at which a boundary carries bf16. Memory is billed as if it did not."""
    generate_rows: int = 0
    """Rows generated together (all groups in flight); 0 means the job never generates."""
    generate_tokens: int = 0
    """Prompt and new tokens of the longest generated row."""
    exact_stages: int | None = None
    replicas_fold: bool = False
    """Replicas hand over the sums of their own micro-batches' gradients, not each micro-batch's: other bits than one
    worker's."""
    sums: SumDtype = "fp32"
    """How gradients travel between those who add them up."""

    @property
    def dtype_bytes(self) -> int:
        """Bytes of one element in the compute dtype."""
        return 4 if self.dtype == "fp32" else 2

    @property
    def sum_bytes(self) -> int:
        """Bytes of one number of a gradient on its way to a sum; the scales of parameters are left out."""
        return 4 if self.sums == "fp32" else 2

    @property
    def most_label_tokens(self) -> int:
        """Label tokens of a micro-batch, however it is cut."""
        return self.label_tokens + (spare_labels(self.label_tokens) if self.may_cut_by_tokens else 0)

    @property
    def num_micro_batches(self) -> int:
        """Micro-batches of one step; the last one may have fewer rows."""
        return -(-self.batch_rows // self.micro_batch_rows)

    @property
    def first_trainable_block(self) -> int:
        """Lowest block that takes part in the backward pass; the number of blocks if none does.

        Blocks below it run without autograd: they keep nothing and cost no backward seconds.
        """
        if self.first_trainable_params:
            return 0
        return next((b for b, params in enumerate(self.adapter_params) if params), len(self.adapter_params))
