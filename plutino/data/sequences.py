"""What an objective takes of a row: its sequences as text, the tokens of them that carry loss, its label."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from tokenizers import Encoding

from plutino.data.formats import Row, RowFormat
from plutino.data.readers import Rows
from plutino.data.templates import RenderedRow, render
from plutino.data.tokenizer import ModelTokenizer
from plutino.errors import DataError
from plutino.job.objective_part import RowUse, TrainOn


def class_names_of(rows: Rows) -> tuple[str, ...]:
    """The classes of labelled rows, sorted.

    Raises:
        DataError: the rows have no labels, or fewer than two classes.
    """
    check_format(rows, "label")
    names = {class_name(row.label) for row in rows.rows if row.label is not None}
    if len(names) < 2:
        raise DataError(f"{rows.path} has {len(names)} class ({', '.join(names)}); there is nothing to tell apart")
    return sorted_class_names(names)


def sorted_class_names(names: Iterable[str]) -> tuple[str, ...]:
    """Classes in their order: by value if all are whole numbers."""
    names = set(names)
    return tuple(sorted(names, key=int if all(re.fullmatch(r"-?\d+", name) for name in names) else None))


def class_name(label: str | float) -> str:
    """A class by its name: whole numbers without a point."""
    return str(int(label)) if isinstance(label, float) and label.is_integer() else str(label)


FORMATS: dict[RowUse, tuple[RowFormat, ...]] = {
    "answers": ("prompt_completion", "messages", "sharegpt", "alpaca"),
    "text": ("text", "labelled"),
    "label": ("labelled",),
    "scored": ("rated",),
    "pairs": ("preference",),
    "source_target": ("prompt_completion", "alpaca"),
}
"""Formats that have what is used of a row."""


def check_format(rows: Rows, use: RowUse) -> None:
    """Refuse rows that have not what an objective uses.

    Raises:
        DataError: with the formats that have it.
    """
    if rows.format not in FORMATS[use]:
        raise DataError(
            f"{rows.path} has rows of the format {rows.format}, this objective takes {' or '.join(FORMATS[use])}; "
            "change objective.type, or name the columns in data.columns and the format in data.format"
        )


def sequences_of(rows: Rows, row: Row, tokenizer: ModelTokenizer, use: RowUse) -> list[RenderedRow]:
    """The sequences of a row as text: two for a pair.

    Raises:
        DataError: the chat template cannot be used for it.
    """
    if use == "source_target":
        return [RenderedRow(row.question, (), 0, is_chat=False, second=row.answer)]
    if use == "label" and tokenizer.ended is not None:
        return [RenderedRow(row.text, (), 0, is_chat=False, second=row.text_pair)]
    if use in ("label", "text"):
        text = f"{row.text}\n{row.text_pair}" if row.text_pair else row.text
        # Every token of raw text carries loss, of labelled text none.
        answers = ((0, len(text)),) if use == "text" else ()
        return [RenderedRow(text, answers, 0, is_chat=False, ends=use == "text")]
    try:
        rendered = [render(row, rows.format, tokenizer.template)]
        if use == "pairs":
            rendered.append(render(replace(row, messages=row.rejected), rows.format, tokenizer.template))
    except DataError as error:
        raise DataError(f"{rows.path}, line {row.line_number}: {error}") from error
    return rendered if use != "scored" else [replace(text, answers=()) for text in rendered]


class LabelError(Exception):
    """A label that the objective cannot use."""


def number_of(row: Row, class_names: Sequence[str]) -> float:
    """A row's class as its number, or its label as it is.

    Raises:
        LabelError: the objective cannot use it.
    """
    assert row.label is not None, "formats with labels have one in every row"
    if class_names:
        name = class_name(row.label)
        if name not in class_names:
            raise LabelError(f"the class {name!r} is not among {', '.join(class_names)}; correct the label")
        return float(class_names.index(name))
    try:
        number = float(row.label)
    except ValueError as error:
        raise LabelError(f"the label {row.label!r} is no number; use objective.type: classification") from error
    if not math.isfinite(number):
        raise LabelError(f"the label {row.label!r} is not finite; correct or remove the row")
    return number


def ended_tokens(
    row: RenderedRow, tokenizer: ModelTokenizer, use: RowUse, max_tokens: int
) -> tuple[NDArray[np.int32], NDArray[np.uint8], int, int]:
    """Tokens for a model with an encoder: of one or two texts that it reads, or of one and what it is to write.

    A text to write is cut at half of ``max_tokens``, what is read of it at the rest.

    Returns:
        Ids, cut at ``max_tokens``; label mask; how many stand before the second text; how many there were.
    """
    if use == "source_target":
        assert row.second is not None, "the row says what is to be written"
        target = tokenizer.encode_ended(row.second, None, max_tokens // 2)
        source = tokenizer.encode_ended(row.text, None, max_tokens - len(target.ids))
        ids, num_first, parts = source.ids + target.ids, len(source.ids), [source, target]
        mask = np.arange(len(ids)) >= num_first
    else:
        whole = tokenizer.encode_ended(row.text, row.second, max_tokens)
        ids, parts = whole.ids, [whole]
        num_first = whole.type_ids.index(1) if 1 in whole.type_ids else len(ids)
        mask = np.zeros(len(ids), bool)
    num_ids = len(ids) + sum(len(cut.ids) for part in parts for cut in part.overflowing)
    return np.array(ids, np.int32), mask.astype(np.uint8), num_first, num_ids


def label_tokens(
    row: RenderedRow, encoding: Encoding, tokenizer: ModelTokenizer, train_on: TrainOn
) -> tuple[NDArray[np.int32], NDArray[np.uint8], int]:
    """Token ids, label mask and number of prompt tokens of one row, uncut."""
    spans = np.array(encoding.offsets, np.int64).reshape(-1, 2)
    # A token of no characters (a dummy prefix) belongs to the character that it stands before.
    begins, ends = spans[:, 0], np.maximum(spans[:, 1], spans[:, 0] + 1)
    mask = np.zeros(len(spans), bool)
    for start_char, end_char in row.answers[-1:] if train_on == "last" else row.answers:
        mask |= (begins < end_char) & (ends > start_char)
    num_prompt = int(np.count_nonzero(ends <= row.prompt_chars))
    ids = np.array(encoding.ids, np.int32)
    if not row.is_chat:
        prefix = np.array(tokenizer.prefix_ids, np.int32)
        suffix = np.array([tokenizer.eos_token_id] if row.ends else [], np.int32)
        ids = np.concatenate([prefix, ids, suffix])
        is_answer = np.full(len(suffix), bool(row.answers))
        mask = np.concatenate([np.zeros(len(prefix), bool), mask, is_answer])
        num_prompt += len(prefix)
    if train_on == "all":
        mask[:] = True
    mask[:1] = False
    return ids, mask.astype(np.uint8), num_prompt
