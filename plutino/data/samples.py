"""Tokenised rows: the value that batches are cut from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from plutino.job.objective_part import LENGTH_DISCOUNTS, Counted


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenRow:
    """One sequence that goes through the pipeline, with what an objective needs of it."""

    ids: NDArray[np.int32]
    mask: NDArray[np.uint8]
    """1 where the token carries loss as a label."""
    segment_lengths: tuple[int, ...] = ()
    """Of a packed row."""
    second_start: int | None = None
    """Tokens before the second of two texts; all of them where there is one."""
    label: float | None = None
    reference_logp: float | None = None


class Batchable(Protocol):
    """What batches are cut from: rows by position, each one sequence or a pair of them."""

    @property
    def lengths(self) -> NDArray[np.int64]:
        """[num_samples], tokens of each row's longest sequence."""

    @property
    def line_numbers(self) -> NDArray[np.int64]:
        """[num_samples], lines of the data file."""

    @property
    def sequences_per_sample(self) -> int:
        """1, or 2 for preference pairs."""

    @property
    def counted(self) -> Counted:
        """What a loss is the mean over."""

    def __len__(self) -> int:
        """Number of samples."""

    def rows(self, index: int) -> Sequence[TokenRow]:
        """The sequences of a sample: the chosen one first."""

    def loss_weight(self, index: int, counted: Counted) -> float:
        """What the sample adds to the number of what is counted, which a step's loss is divided by."""

    def prompt(self, index: int) -> NDArray[np.int32]:
        """Tokens that generation starts from."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Samples:
    """Tokenised rows, one after the other in flat arrays. Sample i is row i of the file's usable rows."""

    input_ids: NDArray[np.int32]
    """[total_tokens]"""
    label_mask: NDArray[np.uint8]
    """[total_tokens], 1 where the token carries loss as a label; a row's first token, which nothing predicts, is 0."""
    starts: NDArray[np.int64]
    """[num_sequences + 1]; sequence s is the half-open range starts[s]:starts[s + 1]."""
    prompt_tokens: NDArray[np.int32]
    """[num_sequences], tokens before the row's last answer: what generation starts from."""
    line_numbers: NDArray[np.int64]
    """[num_samples], lines of the data file."""
    num_truncated: int
    """Sequences cut at max_tokens."""
    sequences_per_sample: int = 1
    """Sample i has the sequences i * sequences_per_sample and those after it."""
    has_second_texts: bool = False
    """``prompt_tokens`` are those before a second text, for encoders that tell the two apart."""
    counted: Counted = "label tokens"
    """What a loss is the mean over."""
    labels: NDArray[np.float32] | None = None
    """[num_samples], class index, number or rating."""
    reference_logps: NDArray[np.float32] | None = None
    """[num_sequences], log-probability of the label tokens under the reference."""

    def __len__(self) -> int:
        return len(self.line_numbers)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """[num_samples], tokens of each row's longest sequence."""
        longest: NDArray[np.int64] = np.diff(self.starts).reshape(-1, self.sequences_per_sample).max(axis=1)
        return longest

    def ids(self, sequence: int) -> NDArray[np.int32]:
        """Tokens of a sequence."""
        return self.input_ids[self.starts[sequence] : self.starts[sequence + 1]]

    def mask(self, sequence: int) -> NDArray[np.uint8]:
        """Label mask of a sequence."""
        return self.label_mask[self.starts[sequence] : self.starts[sequence + 1]]

    def prompt(self, index: int) -> NDArray[np.int32]:
        """Tokens that generation starts from."""
        return self.ids(index)[: self.prompt_tokens[index]]

    def rows(self, index: int) -> list[TokenRow]:
        """See :class:`Batchable`."""
        first = index * self.sequences_per_sample
        label = None if self.labels is None else float(self.labels[index])
        return [
            TokenRow(
                ids=self.ids(sequence),
                mask=self.mask(sequence),
                second_start=int(self.prompt_tokens[sequence]) if self.has_second_texts else None,
                label=label,
                reference_logp=None if self.reference_logps is None else float(self.reference_logps[sequence]),
            )
            for sequence in range(first, first + self.sequences_per_sample)
        ]

    def loss_weight(self, index: int, counted: Counted) -> float:
        """See :class:`Batchable`."""
        if counted == "rows":
            return 1
        num_labels = self.num_labels(index)
        # 0 ** 0 is 1, but a row without label tokens adds nothing.
        return num_labels and num_labels ** (1 - LENGTH_DISCOUNTS.get(counted, 0))

    def num_labels(self, index: int) -> int:
        """Label tokens of a sample."""
        first = index * self.sequences_per_sample
        return sum(int(self.mask(first + s)[1:].sum()) for s in range(self.sequences_per_sample))

    @property
    def most_unlabelled(self) -> int:
        """Most tokens of a sequence that carry no loss, its first included: an encoder-decoder's longest source."""
        counts = np.diff(self.starts) - np.add.reduceat(self.label_mask, self.starts[:-1], dtype=np.int64)
        return int(counts.max())

    @property
    def most_labels(self) -> int:
        """No sample has more label tokens; sequences' first tokens are taken to be none."""
        counts = np.add.reduceat(self.label_mask, self.starts[:: self.sequences_per_sample][:-1], dtype=np.int64)
        return int(counts.max())


class JoinedSamples:
    """Several data sets as one: the samples of the first, then those of the second, and so on.

    Args:
        parts: data sets of one objective; none of them empty.
    """

    def __init__(self, parts: Sequence[Batchable]) -> None:
        self.parts = tuple(parts)
        self.starts: tuple[int, ...] = tuple(int(n) for n in np.cumsum([0, *(len(part) for part in parts)]))
        self.sequences_per_sample = parts[0].sequences_per_sample
        self.counted: Counted = parts[0].counted
        self.lengths: NDArray[np.int64] = np.concatenate([part.lengths for part in parts])
        self.line_numbers: NDArray[np.int64] = np.concatenate([part.line_numbers for part in parts])

    def __len__(self) -> int:
        return self.starts[-1]

    def rows(self, index: int) -> Sequence[TokenRow]:
        """See :class:`Batchable`."""
        part, own = self._find(index)
        return part.rows(own)

    def loss_weight(self, index: int, counted: Counted) -> float:
        """See :class:`Batchable`."""
        part, own = self._find(index)
        return part.loss_weight(own, counted)

    def prompt(self, index: int) -> NDArray[np.int32]:
        """See :class:`Batchable`."""
        part, own = self._find(index)
        return part.prompt(own)

    def _find(self, index: int) -> tuple[Batchable, int]:
        part = int(np.searchsorted(self.starts, index, side="right")) - 1
        return self.parts[part], index - self.starts[part]
