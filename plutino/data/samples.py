"""Tokenised rows: the value that batches are cut from."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True, kw_only=True)
class Samples:
    """Tokenised rows, one after the other in flat arrays. Position i is row i of the file's usable rows."""

    input_ids: NDArray[np.int32]
    """[total_tokens]"""
    label_mask: NDArray[np.uint8]
    """[total_tokens], 1 where the token carries loss as a label; a row's first token, which nothing predicts, is 0."""
    starts: NDArray[np.int64]
    """[num_samples + 1]; row i is the half-open range starts[i]:starts[i + 1]."""
    prompt_tokens: NDArray[np.int32]
    """[num_samples], tokens before the row's last answer: what generation starts from."""
    line_numbers: NDArray[np.int64]
    """[num_samples], lines of the data file."""
    num_truncated: int
    """Rows cut at max_tokens."""

    def __len__(self) -> int:
        return len(self.line_numbers)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """[num_samples], tokens of each row."""
        return np.diff(self.starts)

    def ids(self, index: int) -> NDArray[np.int32]:
        """Tokens of row ``index``."""
        return self.input_ids[self.starts[index] : self.starts[index + 1]]

    def mask(self, index: int) -> NDArray[np.uint8]:
        """Label mask of row ``index``."""
        return self.label_mask[self.starts[index] : self.starts[index + 1]]

    def prompt(self, index: int) -> NDArray[np.int32]:
        """Tokens that generation starts from."""
        return self.ids(index)[: self.prompt_tokens[index]]
