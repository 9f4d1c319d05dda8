"""Windows over a text, by which the perplexity of a language model is measured in a bounded number of tokens.

Every window is as long as the job's longest row, and only its last tokens carry loss, no more of them than a row has:
so the measurement fits into the memory that the job was planned with, and each token counts once.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from plutino.data.samples import Samples
from plutino.data.tokenizer import ModelTokenizer
from plutino.errors import DataError

SCORED_TOKENS = 1024
"""Tokens that carry loss: enough, because the same ones are measured before and after."""
MOST_WINDOWS = 256
"""Bounds the work where a row has few label tokens."""


@dataclass(frozen=True, slots=True)
class GeneralText:
    """A tokenised text, cut into windows."""

    samples: Samples
    sha256: str


def read_general_text(path: Path, tokenizer: ModelTokenizer, *, row_tokens: int, label_tokens: int) -> GeneralText:
    """Cut a text's beginning into windows.

    Args:
        path: a UTF-8 text file.
        tokenizer: the base model's.
        row_tokens: tokens of each window.
        label_tokens: at most so many of them carry loss.

    Raises:
        DataError: the file cannot be read, is not UTF-8, or is shorter than one window.
    """
    try:
        content = path.read_bytes()
        text = content.decode("utf-8")
    except OSError as error:
        raise DataError(f"cannot read evaluation.general {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"evaluation.general {path} is not UTF-8 text (byte {error.start})") from error
    ids = np.array(tokenizer.encode([text])[0].ids, np.int32)
    scored = min(label_tokens, row_tokens - 1)
    num_windows = min(MOST_WINDOWS, -(-SCORED_TOKENS // scored), (len(ids) - row_tokens) // scored + 1)
    if num_windows < 1:
        raise DataError(
            f"evaluation.general {path} has {len(ids)} tokens, one window has {row_tokens}; give a longer text, or set "
            "evaluation.measure_general: never"
        )
    starts = [window * scored for window in range(num_windows)]
    mask = np.zeros(row_tokens, np.uint8)
    mask[-scored:] = 1
    samples = Samples(
        input_ids=np.concatenate([ids[start : start + row_tokens] for start in starts]),
        label_mask=np.tile(mask, num_windows),
        starts=np.arange(num_windows + 1, dtype=np.int64) * row_tokens,
        prompt_tokens=np.zeros(num_windows, np.int32),
        line_numbers=np.arange(1, num_windows + 1, dtype=np.int64),
        num_truncated=0,
    )
    return GeneralText(samples, hashlib.sha256(content).hexdigest())
