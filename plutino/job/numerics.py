"""The numerics record: what fixes a job's bits."""

from __future__ import annotations

from typing import Literal

from plutino.job.base import SpecPart
from plutino.job.model import PLAIN, Packing
from plutino.types import MicroBatchCut, SumDtype


class NumericsRecord(SpecPart):
    """Written before step 0 and stored with the job; a re-plan under ``numerics: fixed`` keeps every field.

    A device that cannot honour it is left out with that reason.
    """

    dtype: Literal["fp32", "bf16"]
    """Compute dtype of the frozen layers; adapters, gradients and moments are always fp32."""
    packing: Packing = PLAIN
    """How the frozen weights are held: a scheme rounds them, so it decides the job's bits."""
    attention: str
    """Attention backend of transformers: sdpa or eager."""
    micro_batch_size: int
    """Rows of one micro-batch; a step's rows are sorted by length and cut into micro-batches of this many."""
    micro_batch_cut: MicroBatchCut = "rows"
    """tokens: cut into as many micro-batches, but by like numbers of tokens; see :mod:`plutino.data.cutting`."""
    threads_per_worker: int | None
    """Intra-op threads of every worker, or None where the budgets differ and each worker uses its device's number.

    Two thread counts may differ in the last bit of an fp32 matrix product (5e-7 measured)."""
    codecs: str
    """Codec of every boundary between stages that bf16_borders does not name: raw or bf16."""
    bf16_borders: tuple[int, ...] = ()
    """Block borders at which hidden states and their gradients are rounded to bf16: by the codec where a stage ends
    there, in place where a re-plan put both blocks into one stage."""
    replicas_fold: bool = False
    """Replicas of a stage add up their own micro-batches before they hand over their gradients. Where they do not, the
    sum runs over all micro-batches in order, as on one worker."""
    sums: SumDtype = "fp32"
    """How gradients that several workers add up are held and travel; fp16 rounds every sum after each addition, those
    of a parameter that one worker has alone included."""
    versions: dict[str, str]
    """Versions of torch, transformers and peft on the workers."""
    arithmetic: str | None = None
    """What the first plan's devices round by (plutino.hardware.Hardware.arithmetic), or None where they differ: then
    the job runs on all of them, and moving a block in a re-plan may change the last bit of its products."""

    def codec_at(self, border: int) -> str:
        """Codec of the boundary between two stages that meet at a block border."""
        return "bf16" if border in self.bf16_borders else self.codecs
