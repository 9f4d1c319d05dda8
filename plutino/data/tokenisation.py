"""Rows to tokens, with a mask of the tokens that carry loss.

Entry points: :func:`load_tokenizer` and :func:`tokenise`. Works on ``tokenizer.json`` with the ``tokenizers`` library
alone, so that a data owner's device needs neither torch nor transformers.
"""

from __future__ import annotations

import json
import math
import re
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Encoding, Tokenizer

from plutino.data.formats import Row, RowFormat
from plutino.data.readers import Rows, name_lines
from plutino.data.samples import Samples
from plutino.data.templates import ChatTemplate, RenderedRow, load_chat_template, render, special_tokens
from plutino.data.token_store import TokenStore
from plutino.errors import DataError, ModelError
from plutino.job.objective import Counted, RowUse, TrainOn

# Rows encoded in one call: enough to keep the tokenizer's threads busy, few enough to bound the encodings held at once
# (an Encoding keeps strings and offsets, some 200 bytes a token).
_ROWS_PER_CALL = 512
_CHARS_PER_CALL = 1 << 19


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelTokenizer:
    """A base model's tokenizer with its chat template."""

    tokenizer: Tokenizer
    """Without a post-processor: special tokens come from the template or from prefix_ids, and offsets are untrimmed."""
    template: ChatTemplate | None
    prefix_ids: tuple[int, ...]
    """What the tokenizer itself puts before a plain text: bos, or nothing."""
    eos_token_id: int
    pad_token_id: int
    stop_token_ids: tuple[int, ...]
    """Generation ends at any of these: eos, and the token that ends an answer in the chat template; ascending."""
    vocab_size: int
    """One more than the largest token id."""

    def encode(self, texts: Sequence[str]) -> list[Encoding]:
        """Encode texts as they are, special tokens in them included, without adding any."""
        return self.tokenizer.encode_batch(list(texts), add_special_tokens=False)

    def decode(self, token_ids: Iterable[int]) -> str:
        """Text of generated tokens up to the first stop token, special tokens left out."""
        answer = []
        for token_id in token_ids:
            if token_id in self.stop_token_ids:
                break
            answer.append(int(token_id))
        return self.tokenizer.decode(answer, skip_special_tokens=True)


def load_tokenizer(model_dir: Path) -> ModelTokenizer:
    """Read tokenizer.json, the special tokens' ids and the chat template of a model folder.

    Raises:
        ModelError: tokenizer.json is missing or unusable, or no end-of-sequence token is named anywhere.
        DataError: the chat template is not valid.
    """
    path = model_dir / "tokenizer.json"
    try:
        definition = json.loads(path.read_text(encoding="utf-8"))
        whole = Tokenizer.from_str(json.dumps(definition))
        bare = Tokenizer.from_str(json.dumps({**definition, "post_processor": None}))
    except FileNotFoundError as error:
        raise ModelError(
            f"{model_dir} has no tokenizer.json; write one with "
            "transformers.AutoTokenizer.from_pretrained(...).save_pretrained(...)"
        ) from error
    except Exception as error:  # tokenizers raises bare Exception for whatever it does not understand
        raise ModelError(f"{path} cannot be read as a tokenizer: {error}; save it again with transformers") from error
    for tokenizer in (whole, bare):
        tokenizer.no_truncation()
        tokenizer.no_padding()
    configs = [_read_json(model_dir / name) for name in ("generation_config.json", "config.json")]
    named = {**special_tokens(_read_json(model_dir / "special_tokens_map.json"))}
    named |= special_tokens(_read_json(model_dir / "tokenizer_config.json"))
    template = load_chat_template(model_dir)
    ends = _token_ids(bare, "eos", named, configs)
    if not ends:
        raise ModelError(f"{model_dir} names no end-of-sequence token; set eos_token in tokenizer_config.json")
    pads = _token_ids(bare, "pad", named, configs)
    stops = {*ends, *([] if template is None else _end_of_turn(bare, template))}
    return ModelTokenizer(
        tokenizer=bare,
        template=template,
        prefix_ids=_prefix_ids(whole),
        eos_token_id=ends[0],
        pad_token_id=pads[0] if pads else ends[0],
        stop_token_ids=tuple(sorted(stops)),
        vocab_size=max(bare.get_vocab(with_added_tokens=True).values()) + 1,
    )


def tokenise(
    rows: Rows,
    tokenizer: ModelTokenizer,
    *,
    max_tokens: int,
    train_on: TrainOn = "answers",
    use: RowUse = "answers",
    counted: Counted = "label tokens",
    class_names: Sequence[str] = (),
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

    Raises:
        DataError: the rows are of a format that has not what is used, the chat template cannot be used, a label is
            unknown, or rows have no label token left within max_tokens.
    """
    _check_format(rows, use)
    made = _Made()
    unlabelled: list[int] = []
    bad_labels: dict[str, list[int]] = {}
    with TokenStore() as store:
        for part, texts in _pieces(rows, tokenizer, use):
            encoded = iter(zip(texts, tokenizer.encode([text.text for text in texts]), strict=True))
            for row in part:
                for _ in range(2 if use == "pairs" else 1):
                    text, encoding = next(encoded)
                    ids, mask, num_prompt = _label(text, encoding, tokenizer, train_on)
                    if use == "text":
                        made.add_pieces(store, ids, mask, max_tokens, row.line_number)
                        continue
                    made.add(store, ids[:max_tokens], mask[:max_tokens], min(num_prompt, max_tokens))
                    made.num_truncated += len(ids) > max_tokens
                    if use in ("answers", "pairs") and not mask[:max_tokens].any():
                        unlabelled.append(row.line_number)
                if use == "text":
                    continue
                made.line_numbers.append(row.line_number)
                if use in ("label", "scored"):
                    try:
                        made.labels.append(_number_of(row, class_names))
                    except _LabelError as error:
                        bad_labels.setdefault(str(error), []).append(row.line_number)
                if row.reference_logps is not None and use == "pairs":
                    made.reference_logps.extend(row.reference_logps)
        if unlabelled:
            unlabelled = list(dict.fromkeys(unlabelled))
            raise DataError(
                f"{rows.path}, {name_lines(unlabelled)}: no answer token within max_tokens = {max_tokens}; "
                "raise data.max_tokens, or shorten or remove these rows"
            )
        if bad_labels:
            raise DataError("; ".join(f"{rows.path}, {name_lines(n)}: {text}" for text, n in bad_labels.items()))
        if not made.line_numbers:
            raise DataError(f"{rows.path}: no row has two tokens or more to learn from")
        input_ids, label_mask = store.finish()
    num_sequences = len(made.prompt_tokens)
    has_logps = len(made.reference_logps) == num_sequences
    if made.reference_logps and not has_logps:
        raise DataError(
            f"{rows.path}: {len(made.reference_logps) // 2} of {len(rows)} rows have reference_chosen_logps and "
            "reference_rejected_logps; give them to all rows or to none"
        )
    return Samples(
        input_ids=input_ids,
        label_mask=label_mask,
        starts=np.array(made.starts, np.int64),
        prompt_tokens=np.array(made.prompt_tokens, np.int32),
        line_numbers=np.array(made.line_numbers, np.int64),
        num_truncated=made.num_truncated,
        sequences_per_sample=2 if use == "pairs" else 1,
        counted=counted,
        labels=np.array(made.labels, np.float32) if made.labels else None,
        reference_logps=np.array(made.reference_logps, np.float32) if has_logps and made.reference_logps else None,
    )


def _pieces(rows: Rows, tokenizer: ModelTokenizer, use: RowUse) -> Iterator[tuple[list[Row], list[RenderedRow]]]:
    """Rows that are encoded in one call, with their sequences as text."""
    part: list[Row] = []
    texts: list[RenderedRow] = []
    num_chars = 0
    for index in range(len(rows)):
        row = rows.rows[index]
        own = _texts(rows, row, tokenizer, use)
        part.append(row)
        texts += own
        num_chars += sum(len(text.text) for text in own)
        if len(part) == _ROWS_PER_CALL or num_chars > _CHARS_PER_CALL:
            yield part, texts
            part, texts, num_chars = [], [], 0
    if part:
        yield part, texts


def class_names_of(rows: Rows) -> tuple[str, ...]:
    """The classes of labelled rows, sorted.

    Raises:
        DataError: the rows have no labels, or fewer than two classes.
    """
    _check_format(rows, "label")
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


_FORMATS: dict[RowUse, tuple[RowFormat, ...]] = {
    "answers": ("prompt_completion", "messages", "sharegpt", "alpaca"),
    "text": ("text", "labelled"),
    "label": ("labelled",),
    "scored": ("rated",),
    "pairs": ("preference",),
}


def _check_format(rows: Rows, use: RowUse) -> None:
    if rows.format not in _FORMATS[use]:
        raise DataError(
            f"{rows.path} has rows of the format {rows.format}, this objective takes {' or '.join(_FORMATS[use])}; "
            "change objective.type, or name the columns in data.columns and the format in data.format"
        )


def _texts(rows: Rows, row: Row, tokenizer: ModelTokenizer, use: RowUse) -> list[RenderedRow]:
    """The sequences of a row as text: two for a pair."""
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


class _LabelError(Exception):
    """A label that the objective cannot use."""


def _number_of(row: Row, class_names: Sequence[str]) -> float:
    assert row.label is not None, "formats with labels have one in every row"
    if class_names:
        name = class_name(row.label)
        if name not in class_names:
            raise _LabelError(f"the class {name!r} is not among {', '.join(class_names)}; correct the label")
        return float(class_names.index(name))
    try:
        number = float(row.label)
    except ValueError as error:
        raise _LabelError(f"the label {row.label!r} is no number; use objective.type: classification") from error
    if not math.isfinite(number):
        raise _LabelError(f"the label {row.label!r} is not finite; correct or remove the row")
    return number


class _Made:
    """What has come of the rows so far, besides their tokens."""

    def __init__(self) -> None:
        self.starts = array("q", [0])
        self.prompt_tokens = array("i")
        self.line_numbers = array("q")
        self.labels = array("f")
        self.reference_logps = array("f")
        self.num_truncated = 0

    def add(self, store: TokenStore, ids: NDArray[np.int32], mask: NDArray[np.uint8], num_prompt: int) -> None:
        store.append(ids, mask)
        self.starts.append(self.starts[-1] + len(ids))
        self.prompt_tokens.append(num_prompt)

    def add_pieces(
        self, store: TokenStore, ids: NDArray[np.int32], mask: NDArray[np.uint8], max_tokens: int, line_number: int
    ) -> None:
        """Add a document in pieces; one token alone has nothing that predicts it and is left out."""
        for first in range(0, len(ids), max_tokens):
            piece_mask = mask[first : first + max_tokens].copy()
            piece_mask[:1] = 0
            if piece_mask.any():
                self.add(store, ids[first : first + max_tokens], piece_mask, 0)
                self.line_numbers.append(line_number)


def _label(
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


def _token_ids(tokenizer: Tokenizer, kind: str, named: dict[str, str], configs: Sequence[dict[str, Any]]) -> list[int]:
    """Ids of eos or pad, the tokenizer's own first, then those of generation_config.json and config.json."""
    found = []
    text = named.get(f"{kind}_token")
    token_id = None if text is None else tokenizer.token_to_id(text)
    if token_id is not None:
        found.append(token_id)
    for config in configs:
        value = config.get(f"{kind}_token_id")
        found += [value] if isinstance(value, int) else list(value or ())
    return list(dict.fromkeys(found))


def _end_of_turn(tokenizer: Tokenizer, template: ChatTemplate) -> list[int]:
    """The special token that follows an answer in the template, if one does; ordinary text is no safe place to stop."""
    special = {token_id for token_id, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    ids = tokenizer.encode(template.answer_end(), add_special_tokens=False).ids
    return [token_id for token_id in ids if token_id in special][:1]


def _prefix_ids(tokenizer: Tokenizer) -> tuple[int, ...]:
    encoding = tokenizer.encode("a", add_special_tokens=True)
    num_before = next(index for index, is_special in enumerate(encoding.special_tokens_mask) if not is_special)
    return tuple(encoding.ids[:num_before])


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{path} is not JSON: {error}; fetch the model again") from error
    return values
