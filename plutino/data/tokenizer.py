"""A base model's tokenizer with its chat template.

Entry point: :func:`load_tokenizer`. Works on ``tokenizer.json`` with the ``tokenizers`` library alone, so that a data
owner's device needs neither torch nor transformers.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Encoding, Tokenizer

from plutino.data.templates import ChatTemplate, load_chat_template, special_tokens
from plutino.errors import ModelError


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelTokenizer:
    """A base model's tokenizer with its chat template."""

    tokenizer: Tokenizer
    """Without a post-processor: special tokens come from the template or from prefix_ids, and offsets are untrimmed."""
    ended: Tokenizer | None
    """With its post-processor, where that puts an end token behind a text, as those of models with an encoder do."""
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

    def encode_ended(self, first: str, second: str | None, max_tokens: int) -> Encoding:
        """Encode a text, or two, with the tokenizer's own special tokens; the longer one is cut first."""
        assert self.ended is not None, "the tokenizer ends texts"
        self.ended.enable_truncation(max_tokens)
        return self.ended.encode(first, second)

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
    prefix_ids, suffix_ids = _added_ids(whole)
    ends = _token_ids(bare, "eos", named, configs) or list(suffix_ids[-1:])
    if not ends:
        raise ModelError(f"{model_dir} names no end-of-sequence token; set eos_token in tokenizer_config.json")
    pads = _token_ids(bare, "pad", named, configs)
    stops = {*ends, *([] if template is None else _end_of_turn(bare, template))}
    return ModelTokenizer(
        tokenizer=bare,
        template=template,
        ended=whole if suffix_ids else None,
        prefix_ids=prefix_ids,
        eos_token_id=ends[0],
        pad_token_id=pads[0] if pads else ends[0],
        stop_token_ids=tuple(sorted(stops)),
        vocab_size=max(bare.get_vocab(with_added_tokens=True).values()) + 1,
    )


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


def _added_ids(tokenizer: Tokenizer) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """What the tokenizer itself puts before and behind a plain text."""
    encoding = tokenizer.encode("a", add_special_tokens=True)
    own = [index for index, is_special in enumerate(encoding.special_tokens_mask) if not is_special]
    return tuple(encoding.ids[: own[0]]), tuple(encoding.ids[own[-1] + 1 :])


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{path} is not JSON: {error}; fetch the model again") from error
    return values
