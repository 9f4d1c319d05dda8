"""What a file of rows looks like to a model: which tokens carry loss, lengths, and what is wrong with its rows.

Entry point: :func:`preview_rows`. The file is read row by row; memory holds about 50 bytes a row.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from plutino.data.readers import Rows
from plutino.data.sequences import check_format, class_names_of, ended_tokens, label_tokens, sequences_of
from plutino.data.tokenisation import PartTokens, Reading, tokenise_range
from plutino.data.tokenizer import ModelTokenizer

_LINES_NAMED = 20
_NUM_BARS = 12


class _Value(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class Lines(_Value):
    """Some rows, by their lines."""

    num_rows: int = 0
    first: tuple[int, ...] = ()
    """The first few lines."""


class Problem(_Value):
    """What is wrong with some rows, and the way out."""

    text: str
    lines: Lines


class Bar(_Value):
    """Rows whose length lies in a range."""

    from_tokens: int
    to_tokens: int
    """The last length of the range."""
    num_rows: int


class Lengths(_Value):
    """Tokens of sequences before anything is cut."""

    shortest: int
    median: int
    p90: int
    p99: int
    longest: int
    mean: float
    histogram: tuple[Bar, ...]


class ShownToken(_Value):
    """A token as people read it."""

    text: str
    """Its characters; of several tokens that make one character the first has it."""
    carries_loss: bool
    is_cut: bool
    """It lies beyond max_tokens."""


class ShownSequence(_Value):
    """A sequence of a row, token by token."""

    line_number: int
    tokens: tuple[ShownToken, ...]
    label: str = ""
    """The row's label or rating; empty if it has none."""


class RowsPreview(_Value):
    """A file of rows as a job would read it."""

    path: str
    format: str
    """As it was recognised or stated."""
    use: str
    """What an objective takes of its rows."""
    max_tokens: int
    num_rows: int
    """Usable by their form."""
    unreadable: tuple[Problem, ...]
    """Rows that no job reads: each would be refused with these words."""
    unusable: tuple[Problem, ...]
    """Rows of the right form that the objective cannot use."""
    truncated: Lines
    """Cut at max_tokens; of raw text: gone on with in further samples."""
    dropped: Lines
    """Raw text of one token, which leaves nothing to predict."""
    duplicates: Lines
    """Rows whose tokens and label an earlier row has; the earlier ones are not counted."""
    duplicate_of: dict[int, int]
    """Line of each duplicate that is named -> line of the first such row."""
    num_samples: int
    num_tokens: int
    """Of all samples, as cut."""
    num_label_tokens: int
    lengths: Lengths | None
    """None: no row is usable."""
    classes: dict[str, int]
    """Rows of each class, where rows have classes."""
    shown: tuple[ShownSequence, ...]

    @property
    def has_problems(self) -> bool:
        """Whether a job over these rows is refused."""
        return bool(self.unreadable or self.unusable)


def preview_rows(
    rows: Rows, tokenizer: ModelTokenizer, reading: Reading, *, num_shown: int = 3, has_classes: bool = False
) -> RowsPreview:
    """Tokenise all rows as a job would, and say what comes of them.

    Args:
        rows: what :func:`plutino.data.readers.scan_rows` gave.
        tokenizer: the base model's.
        reading: what is made of them; without class names they are taken from the rows.
        num_shown: rows to show token by token.
        has_classes: labels are classes rather than numbers.

    Raises:
        DataError: the rows' format has not what is used, or the chat template cannot be used.
    """
    if has_classes and not reading.class_names:
        reading = replace(reading, class_names=class_names_of(rows))
    check_format(rows, reading.use)
    seen = _Seen(reading)
    for part in tokenise_range(rows, tokenizer, reading):
        seen.add(part)
    shown = [s for index in range(min(num_shown, len(rows))) for s in show_row(rows, index, tokenizer, reading)]
    lines = np.array(seen.row_lines, np.int64)
    tokens = np.array(seen.row_tokens, np.int64)
    longest = tokens.reshape(len(lines), -1).max(axis=1) if len(lines) else tokens
    duplicates, firsts = seen.duplicates()
    return RowsPreview(
        path=str(rows.path),
        format=rows.format,
        use=reading.use,
        max_tokens=reading.max_tokens,
        num_rows=len(rows),
        unreadable=tuple(Problem(text=text, lines=_lines(of)) for text, of in rows.problems.items()),
        unusable=tuple(Problem(text=text, lines=_lines(of)) for text, of in seen.problems.items()),
        truncated=_lines(lines[longest > reading.max_tokens]),
        dropped=_lines(seen.dropped),
        duplicates=_lines(duplicates),
        duplicate_of={int(a): int(b) for a, b in zip(duplicates[:_LINES_NAMED], firsts, strict=False)},
        num_samples=seen.num_samples,
        num_tokens=seen.num_tokens,
        num_label_tokens=seen.num_label_tokens,
        lengths=_lengths(tokens) if len(tokens) else None,
        classes={name: int(seen.class_counts[i]) for i, name in enumerate(reading.class_names)},
        shown=tuple(shown),
    )


def show_row(rows: Rows, index: int, tokenizer: ModelTokenizer, reading: Reading) -> Iterator[ShownSequence]:
    """A row's sequences token by token."""
    row = rows.rows[index]
    label = "" if row.label is None or reading.use not in ("label", "scored") else str(row.label)
    for text in sequences_of(rows, row, tokenizer, reading.use):
        if reading.reads_ended(tokenizer):
            ids, mask, _, _ = ended_tokens(text, tokenizer, reading.use, reading.max_tokens)
            names = [f"{tokenizer.tokenizer.id_to_token(token_id)} " for token_id in ids.tolist()]
            shown = (ShownToken(text=n, carries_loss=bool(m), is_cut=False) for n, m in zip(names, mask, strict=True))
            yield ShownSequence(line_number=row.line_number, label=label, tokens=tuple(shown))
            continue
        encoding = tokenizer.encode([text.text])[0]
        ids, mask, _ = label_tokens(text, encoding, tokenizer, reading.train_on)
        num_before = 0 if text.is_chat else len(tokenizer.prefix_ids)
        words: list[str] = []
        shown_to = 0
        for position, token_id in enumerate(ids.tolist()):
            at = position - num_before
            if 0 <= at < len(encoding.offsets):
                end = max(encoding.offsets[at][1], shown_to)
                words.append(text.text[shown_to:end])
                shown_to = end
            else:
                words.append(tokenizer.tokenizer.id_to_token(token_id) or "")
        yield ShownSequence(
            line_number=row.line_number,
            label=label,
            tokens=tuple(
                ShownToken(
                    text=word,
                    carries_loss=bool(mask[position]),
                    is_cut=reading.use != "text" and position >= reading.max_tokens,
                )
                for position, word in enumerate(words)
            ),
        )


@dataclass(slots=True)
class _Seen:
    """What has come of the rows so far: some numbers for each of them."""

    reading: Reading
    row_lines: array[int] = field(default_factory=lambda: array("q"))
    row_tokens: array[int] = field(default_factory=lambda: array("q"))
    hashed_lines: array[int] = field(default_factory=lambda: array("q"))
    hashes: array[int] = field(default_factory=lambda: array("Q"))
    dropped: array[int] = field(default_factory=lambda: array("q"))
    problems: dict[str, list[int]] = field(default_factory=dict)
    num_samples: int = 0
    num_tokens: int = 0
    num_label_tokens: int = 0
    class_counts: NDArray[np.int64] = field(init=False)

    def __post_init__(self) -> None:
        self.class_counts = np.zeros(max(1, len(self.reading.class_names)), np.int64)

    def add(self, part: PartTokens) -> None:
        self.row_lines.frombytes(part.row_lines.tobytes())
        self.row_tokens.frombytes(part.row_tokens.tobytes())
        self.num_samples += len(part.line_numbers)
        self.num_tokens += len(part.input_ids)
        self.num_label_tokens += int(part.label_mask.sum())
        self.dropped.extend(sorted(set(part.row_lines.tolist()) - set(part.line_numbers.tolist())))
        if part.unlabelled:
            text = f"no answer token within max_tokens = {self.reading.max_tokens}; raise it, or shorten or remove them"
            self.problems.setdefault(text, []).extend(part.unlabelled)
        for text, lines in part.bad_labels:
            self.problems.setdefault(text, []).extend(lines)
        # A row of which the label cannot be used has none here, so that labels and rows no longer go together.
        labels = part.labels.tolist() if not part.bad_labels else []
        if self.reading.class_names:
            self.class_counts += np.bincount(np.array(labels, np.int64), minlength=len(self.class_counts))
        ends = np.cumsum(part.lengths)
        sequences = _cut(part, ends)
        for line, samples in groupby(enumerate(part.line_numbers.tolist()), key=lambda pair: pair[1]):
            digest = hashlib.blake2b(digest_size=8)
            for sample, _ in samples:
                digest.update(repr(labels[sample]).encode() if labels else b"")
                for _ in range(self.reading.sequences_per_row):
                    digest.update(next(sequences))
            self.hashed_lines.append(line)
            self.hashes.append(int.from_bytes(digest.digest(), "little"))

    def duplicates(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Lines of rows that an earlier row equals, and of these earlier ones."""
        lines = np.array(self.hashed_lines, np.int64)
        _, first, inverse = np.unique(np.array(self.hashes, np.uint64), return_index=True, return_inverse=True)
        is_again = first[inverse] != np.arange(len(lines))
        return lines[is_again], lines[first[inverse]][is_again]


def _cut(part: PartTokens, ends: NDArray[np.int64]) -> Iterator[bytes]:
    """Tokens and label mask of each sequence."""
    for start, end in zip((ends - part.lengths).tolist(), ends.tolist(), strict=True):
        yield part.input_ids[start:end].tobytes() + b"|" + part.label_mask[start:end].tobytes()


def _lines(numbers: Sequence[int] | NDArray[np.int64]) -> Lines:
    return Lines(num_rows=len(numbers), first=tuple(int(number) for number in numbers[:_LINES_NAMED]))


def _lengths(tokens: NDArray[np.int64]) -> Lengths:
    shortest, longest = int(tokens.min()), int(tokens.max())
    width = max(1, -(-(longest - shortest + 1) // _NUM_BARS))
    counts = np.bincount((tokens - shortest) // width)
    median, p90, p99 = (int(q) for q in np.quantile(tokens, [0.5, 0.9, 0.99], method="higher"))
    return Lengths(
        shortest=shortest,
        median=median,
        p90=p90,
        p99=p99,
        longest=longest,
        mean=float(tokens.mean()),
        histogram=tuple(
            Bar(
                from_tokens=shortest + i * width,
                to_tokens=min(shortest + (i + 1) * width - 1, longest),
                num_rows=int(count),
            )
            for i, count in enumerate(counts)
        ),
    )
