"""Rows to tokens, with a mask of the tokens that carry loss.

Entry points: :func:`tokenise`, and :func:`tokenise_range` for a part of the rows: what it gives of a row depends on no
other row, so parts that were made anywhere, joined in the rows' order, are the same bytes.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from plutino.data.formats import Row
from plutino.data.readers import Rows, name_lines
from plutino.data.samples import Samples
from plutino.data.sequences import (
    LabelError,
    check_format,
    ended_tokens,
    label_tokens,
    number_of,
    sequences_of,
)
from plutino.data.templates import RenderedRow
from plutino.data.token_store import TokenStore
from plutino.data.tokenizer import ModelTokenizer
from plutino.errors import DataError
from plutino.job.objective_part import Counted, RowUse, TrainOn

# Rows encoded in one call: enough to keep the tokenizer's threads busy, few enough to bound the encodings held at once
# (an Encoding keeps strings and offsets, some 200 bytes a token).
_ROWS_PER_CALL = 512
_CHARS_PER_CALL = 1 << 19


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """What is made of rows."""

    max_tokens: int
    """Longer sequences are cut at the end; raw text goes on in a further sample."""
    train_on: TrainOn = "answers"
    use: RowUse = "answers"
    class_names: tuple[str, ...] = ()
    """In the order of their numbers; empty: labels are numbers."""

    @property
    def sequences_per_row(self) -> int:
        """2 for pairs."""
        return 2 if self.use == "pairs" else 1

    def reads_ended(self, tokenizer: ModelTokenizer) -> bool:
        """Whether texts are given as to an encoder, with the tokenizer's own special tokens."""
        return self.use == "source_target" or (self.use == "label" and tokenizer.ended is not None)


@dataclass(frozen=True, slots=True, kw_only=True)
class PartTokens:
    """Some rows, tokenised."""

    input_ids: NDArray[np.int32]
    """[tokens]"""
    label_mask: NDArray[np.uint8]
    """[tokens], 1 where the token carries loss as a label."""
    lengths: NDArray[np.int64]
    """[sequences], tokens of each."""
    prompt_tokens: NDArray[np.int32]
    """[sequences]"""
    line_numbers: NDArray[np.int64]
    """[samples]; a document in several pieces has its line several times."""
    row_lines: NDArray[np.int64]
    """[rows], all that were read."""
    row_tokens: NDArray[np.int64]
    """[rows x sequences of a row], tokens before anything was cut."""
    labels: NDArray[np.float32]
    """[samples], or empty where none are used."""
    reference_logps: NDArray[np.float32]
    """[sequences of the rows that have them]"""
    unlabelled: tuple[int, ...] = ()
    """Lines of rows without a label token within max_tokens."""
    bad_labels: tuple[tuple[str, tuple[int, ...]], ...] = ()
    """What is wrong with labels, and their lines."""


Spread = Callable[[Rows, Reading], "Iterator[PartTokens] | None"]
"""Tokenises rows elsewhere and gives the parts in the rows' order; None: the rows are too few for that."""


def tokenise(
    rows: Rows,
    tokenizer: ModelTokenizer,
    *,
    max_tokens: int,
    train_on: TrainOn = "answers",
    use: RowUse = "answers",
    counted: Counted = "label tokens",
    class_names: Sequence[str] = (),
    spread: Spread | None = None,
) -> Samples:
    """Tokenise rows and mark the tokens that carry loss.

    A row is encoded whole, exactly as it is at inference; a token carries loss if any of its characters belongs to an
    answer, so a token across the border of prompt and answer is learned and is no part of the prompt. Rows are taken
    and encoded in pieces, and their tokens lie in a temporary file: memory holds some 40 bytes a row.

    Args:
        rows: what :func:`plutino.data.readers.read_rows` gave.
        tokenizer: the base model's.
        max_tokens: longer rows are cut at the end, and counted; raw text goes on in a further sample.
        train_on: all answers, only the last one that carries loss, or "all" to let every token carry loss.
        use: what of a row is used.
        counted: what the loss is the mean over.
        class_names: the classes in the order of their numbers; empty: labels are numbers.
        spread: where many rows are tokenised; None: all of them here.

    Raises:
        DataError: the rows are of a format that has not what is used, the chat template cannot be used, a label is
            unknown, or rows have no label token left within max_tokens.
    """
    check_format(rows, use)
    if use == "source_target" and tokenizer.ended is None:
        raise DataError(
            "the model's tokenizer puts no end token behind a text, so that no target would end; use a model with an "
            "encoder and its own tokenizer"
        )
    reading = Reading(max_tokens=max_tokens, train_on=train_on, use=use, class_names=tuple(class_names))
    elsewhere = None if spread is None else spread(rows, reading)
    parts = tokenise_range(rows, tokenizer, reading) if elsewhere is None else elsewhere
    starts, prompt_tokens, line_numbers = array("q", [0]), array("i"), array("q")
    labels, reference_logps = array("f"), array("f")
    num_truncated = 0
    unlabelled: list[int] = []
    bad_labels: dict[str, list[int]] = {}
    with TokenStore() as store:
        for part in parts:
            store.append(part.input_ids, part.label_mask)
            starts.frombytes((starts[-1] + np.cumsum(part.lengths)).astype(np.int64).tobytes())
            prompt_tokens.frombytes(part.prompt_tokens.tobytes())
            line_numbers.frombytes(part.line_numbers.tobytes())
            labels.frombytes(part.labels.tobytes())
            reference_logps.frombytes(part.reference_logps.tobytes())
            num_truncated += int((part.row_tokens > max_tokens).sum()) if use != "text" else 0
            unlabelled += part.unlabelled
            for problem, lines in part.bad_labels:
                bad_labels.setdefault(problem, []).extend(lines)
        if unlabelled:
            raise DataError(
                f"{rows.path}, {name_lines(unlabelled)}: no answer token within max_tokens = {max_tokens}; "
                "raise data.max_tokens, or shorten or remove these rows"
            )
        if bad_labels:
            raise DataError("; ".join(f"{rows.path}, {name_lines(n)}: {text}" for text, n in bad_labels.items()))
        if not line_numbers:
            raise DataError(f"{rows.path}: no row has two tokens or more to learn from")
        input_ids, label_mask = store.finish()
    has_logps = len(reference_logps) == len(prompt_tokens)
    if reference_logps and not has_logps:
        raise DataError(
            f"{rows.path}: {len(reference_logps) // 2} of {len(rows)} rows have reference_chosen_logps and "
            "reference_rejected_logps; give them to all rows or to none"
        )
    return Samples(
        input_ids=input_ids,
        label_mask=label_mask,
        starts=np.array(starts, np.int64),
        prompt_tokens=np.array(prompt_tokens, np.int32),
        line_numbers=np.array(line_numbers, np.int64),
        num_truncated=num_truncated,
        sequences_per_sample=reading.sequences_per_row,
        has_second_texts=use == "label" and reading.reads_ended(tokenizer),
        counted=counted,
        labels=np.array(labels, np.float32) if labels else None,
        reference_logps=np.array(reference_logps, np.float32) if has_logps and reference_logps else None,
    )


def tokenise_range(
    rows: Rows, tokenizer: ModelTokenizer, reading: Reading, start: int = 0, stop: int | None = None
) -> Iterator[PartTokens]:
    """Rows ``[start, stop)`` in parts of at most some hundred rows, in their order.

    Raises:
        DataError: the chat template cannot be used for a row.
    """
    part = _Part(reading)
    for index in range(start, len(rows) if stop is None else stop):
        part.take(rows, rows.rows[index], tokenizer)
        if part.is_full:
            yield part.encode(tokenizer)
            part = _Part(reading)
    if part.rows:
        yield part.encode(tokenizer)


_Sequence = tuple[NDArray[np.int32], NDArray[np.uint8], int, int]
"""Ids, label mask, tokens before the answer or the second text, and how many ids there were before a cut."""


@dataclass(slots=True)
class _Part:
    """Rows that are encoded in one call, and what comes of them."""

    reading: Reading
    rows: list[Row] = field(default_factory=list)
    texts: list[RenderedRow] = field(default_factory=list)
    num_chars: int = 0
    ids: list[NDArray[np.int32]] = field(default_factory=list)
    masks: list[NDArray[np.uint8]] = field(default_factory=list)
    prompt_tokens: list[int] = field(default_factory=list)
    line_numbers: list[int] = field(default_factory=list)
    row_tokens: list[int] = field(default_factory=list)
    labels: list[float] = field(default_factory=list)
    reference_logps: list[float] = field(default_factory=list)
    unlabelled: list[int] = field(default_factory=list)
    bad_labels: dict[str, list[int]] = field(default_factory=dict)

    @property
    def is_full(self) -> bool:
        return len(self.rows) == _ROWS_PER_CALL or self.num_chars > _CHARS_PER_CALL

    def take(self, rows: Rows, row: Row, tokenizer: ModelTokenizer) -> None:
        own = sequences_of(rows, row, tokenizer, self.reading.use)
        self.rows.append(row)
        self.texts += own
        self.num_chars += sum(len(text.text) for text in own)

    def encode(self, tokenizer: ModelTokenizer) -> PartTokens:
        reading = self.reading
        sequences = self._ended(tokenizer) if reading.reads_ended(tokenizer) else self._plain(tokenizer)
        for row in self.rows:
            for _ in range(reading.sequences_per_row):
                ids, mask, num_prompt, num_ids = next(sequences)
                self.row_tokens.append(num_ids)
                if reading.use == "text":
                    self._add_pieces(ids, mask, row.line_number)
                else:
                    self._add(ids[: reading.max_tokens], mask[: reading.max_tokens], num_prompt, row.line_number)
            if reading.use == "text":
                continue
            self.line_numbers.append(row.line_number)
            if reading.use in ("label", "scored"):
                try:
                    self.labels.append(number_of(row, reading.class_names))
                except LabelError as error:
                    self.bad_labels.setdefault(str(error), []).append(row.line_number)
            if row.reference_logps is not None and reading.use == "pairs":
                self.reference_logps.extend(row.reference_logps)
        return PartTokens(
            input_ids=_joined(self.ids, np.int32),
            label_mask=_joined(self.masks, np.uint8),
            lengths=np.array([len(ids) for ids in self.ids], np.int64),
            prompt_tokens=np.array(self.prompt_tokens, np.int32),
            line_numbers=np.array(self.line_numbers, np.int64),
            row_lines=np.array([row.line_number for row in self.rows], np.int64),
            row_tokens=np.array(self.row_tokens, np.int64),
            labels=np.array(self.labels, np.float32),
            reference_logps=np.array(self.reference_logps, np.float32),
            unlabelled=tuple(dict.fromkeys(self.unlabelled)),
            bad_labels=tuple((problem, tuple(lines)) for problem, lines in self.bad_labels.items()),
        )

    def _plain(self, tokenizer: ModelTokenizer) -> Iterator[_Sequence]:
        encodings = tokenizer.encode([text.text for text in self.texts])
        for text, encoding in zip(self.texts, encodings, strict=True):
            ids, mask, num_prompt = label_tokens(text, encoding, tokenizer, self.reading.train_on)
            yield ids, mask, num_prompt, len(ids)

    def _ended(self, tokenizer: ModelTokenizer) -> Iterator[_Sequence]:
        for text in self.texts:
            yield ended_tokens(text, tokenizer, self.reading.use, self.reading.max_tokens)

    def _add(self, ids: NDArray[np.int32], mask: NDArray[np.uint8], num_prompt: int, line_number: int) -> None:
        self.ids.append(ids)
        self.masks.append(mask)
        self.prompt_tokens.append(min(num_prompt, self.reading.max_tokens))
        if self.reading.use in ("answers", "pairs") and not mask.any():
            self.unlabelled.append(line_number)

    def _add_pieces(self, ids: NDArray[np.int32], mask: NDArray[np.uint8], line_number: int) -> None:
        """Add a document in pieces; one token alone has nothing that predicts it and is left out."""
        max_tokens = self.reading.max_tokens
        for first in range(0, len(ids), max_tokens):
            piece_mask = mask[first : first + max_tokens].copy()
            piece_mask[:1] = 0
            if piece_mask.any():
                self._add(ids[first : first + max_tokens], piece_mask, 0, line_number)
                self.line_numbers.append(line_number)


def _joined(arrays: Sequence[NDArray[np.generic]], dtype: type[np.generic]) -> NDArray[Any]:
    return np.concatenate(arrays).astype(dtype, copy=False) if arrays else np.zeros(0, dtype)
