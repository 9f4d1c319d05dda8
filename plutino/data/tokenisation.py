"""Rows to tokens, with a mask of the tokens that carry loss.

Entry points: :func:`load_tokenizer` and :func:`tokenise`. Works on ``tokenizer.json`` with the ``tokenizers`` library
alone, so that a data owner's device needs neither torch nor transformers.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from tokenizers import Encoding, Tokenizer

from plutino.data.readers import Rows, name_lines
from plutino.data.samples import Samples
from plutino.data.templates import ChatTemplate, RenderedRow, load_chat_template, render, special_tokens
from plutino.errors import DataError, ModelError

TrainOn = Literal["answers", "last", "all"]
"""Which tokens of a conversation carry loss."""

# Rows encoded in one call: enough to keep the tokenizer's threads busy, few enough to bound the encodings held at once
# (an Encoding keeps strings and offsets, some 200 bytes a token).
_ROWS_PER_CALL = 512


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


def tokenise(rows: Rows, tokenizer: ModelTokenizer, *, max_tokens: int, train_on: TrainOn = "answers") -> Samples:
    """Tokenise rows and mark the tokens that carry loss.

    A row is encoded whole, exactly as it is at inference; a token carries loss if any of its characters belongs to an
    answer, so a token across the border of prompt and answer is learned and is no part of the prompt.

    Args:
        rows: what :func:`plutino.data.readers.read_rows` gave.
        tokenizer: the base model's.
        max_tokens: longer rows are cut at the end, and counted.
        train_on: all answers, only the last one that carries loss, or "all" to let every token carry loss.

    Raises:
        DataError: the chat template cannot be used, or rows have no label token left within max_tokens.
    """
    ids: list[NDArray[np.int32]] = []
    masks: list[NDArray[np.uint8]] = []
    prompt_tokens: list[int] = []
    num_truncated = 0
    unlabelled: list[int] = []
    for first in range(0, len(rows), _ROWS_PER_CALL):
        part = rows.rows[first : first + _ROWS_PER_CALL]
        rendered = []
        for row in part:
            try:
                rendered.append(render(row, rows.format, tokenizer.template))
            except DataError as error:
                raise DataError(f"{rows.path}, line {row.line_number}: {error}") from error
        for row, text, encoding in zip(part, rendered, tokenizer.encode([r.text for r in rendered]), strict=True):
            row_ids, row_mask, num_prompt = _label(text, encoding, tokenizer, train_on)
            num_truncated += len(row_ids) > max_tokens
            if not row_mask[:max_tokens].any():
                unlabelled.append(row.line_number)
            ids.append(row_ids[:max_tokens])
            masks.append(row_mask[:max_tokens])
            prompt_tokens.append(min(num_prompt, max_tokens))
    if unlabelled:
        raise DataError(
            f"{rows.path}, {name_lines(unlabelled)}: no answer token within max_tokens = {max_tokens}; "
            "raise data.max_tokens, or shorten or remove these rows"
        )
    return Samples(
        input_ids=np.concatenate(ids),
        label_mask=np.concatenate(masks),
        starts=np.cumsum([0, *(len(row) for row in ids)], dtype=np.int64),
        prompt_tokens=np.array(prompt_tokens, np.int32),
        line_numbers=np.array([row.line_number for row in rows.rows], np.int64),
        num_truncated=num_truncated,
    )


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
        ids = np.concatenate([prefix, ids, np.array([tokenizer.eos_token_id], np.int32)])
        mask = np.concatenate([np.zeros(len(prefix), bool), mask, np.ones(1, bool)])
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
