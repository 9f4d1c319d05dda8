"""What the columns of a row mean: the shapes of rows that are known, and how each becomes a :class:`Row`.

Entry points: :func:`recognise` and :func:`to_row`. A row that cannot be used raises :class:`BadRowError` with what is
wrong and the way out; equal texts are reported once with all their lines.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

RowFormat = Literal["prompt_completion", "messages", "sharegpt", "alpaca", "preference", "rated", "labelled", "text"]

_KEYS: dict[RowFormat, frozenset[str]] = {
    "messages": frozenset({"messages"}),
    "sharegpt": frozenset({"conversations"}),
    "preference": frozenset({"chosen", "rejected"}),
    "alpaca": frozenset({"instruction", "output"}),
    "rated": frozenset({"prompt", "completion", "rating"}),
    "prompt_completion": frozenset({"prompt", "completion"}),
    "labelled": frozenset({"text", "label"}),
    "text": frozenset({"text"}),
}
"""Columns by which a format is recognised; the first that fits counts."""

_ALIASES = {
    "reward": "rating",
    "sentence": "text",
    "sentence1": "text",
    "premise": "text",
    "sentence2": "text_pair",
    "hypothesis": "text_pair",
}
"""Names that well-known data sets use, taken where the row lacks ours."""

_SHAREGPT_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}

_MAX_CHARS = 1 << 22
"""Of a row, some 700,000 words: a tokenizer takes some hundred bytes of memory for each token of a text."""

_PLACEHOLDER = re.compile(r"\{(\w+)\}")


class BadRowError(Exception):
    """What is wrong with one row and the way out."""


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation."""

    role: str
    content: str
    carries_loss: bool = False
    """True for what the assistant says, unless the row gives the message OpenAI's ``"weight": 0``."""


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a file: a conversation, two of them, or a text."""

    line_number: int
    """Counted from 1, as editors do."""
    messages: tuple[Message, ...] = ()
    """At least one assistant message carries loss; empty for plain and labelled text."""
    rejected: tuple[Message, ...] = ()
    """Of a preference pair: the conversation with the worse answer."""
    text: str = ""
    text_pair: str = ""
    """The second of two texts that are labelled together."""
    label: str | float | None = None
    """A class, a number, or the answer's rating."""
    reference_logps: tuple[float, float] | None = None
    """Log-probabilities of the chosen and of the rejected answer under a reference, where the row has them."""

    @property
    def last_answer(self) -> int:
        """Index of the last assistant message: the one that is generated and scored."""
        return max(index for index, message in enumerate(self.messages) if message.role == "assistant")

    @property
    def answer(self) -> str:
        """The text that a generated answer is compared with."""
        return self.messages[self.last_answer].content

    @property
    def question(self) -> str:
        """What the last answer answers, for people to read; empty if the row begins with it."""
        return "" if self.last_answer == 0 else self.messages[self.last_answer - 1].content


def renamed(values: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """The row under the names of a format.

    Args:
        values: the row as the file has it.
        columns: name in the format -> the file's column, or a text with columns in braces.

    Raises:
        BadRowError: the row lacks a column that is asked for.
    """
    result = {**values}
    for alias, name in _ALIASES.items():
        if alias in values and name not in values:
            result[name] = values[alias]
    for name, source in columns.items():
        if "{" in source:
            result[name] = _PLACEHOLDER.sub(lambda match: str(_column(values, match[1])), source)
        else:
            result[name] = _column(values, source)
    return result


def recognise(values: Mapping[str, Any]) -> RowFormat:
    """The format of a row, by its columns.

    Raises:
        BadRowError: they fit none.
    """
    for name, keys in _KEYS.items():
        if keys <= values.keys():
            return name
    raise BadRowError(f"found {_found(values)}; {KNOWN_SHAPES}")


def to_row(values: Mapping[str, Any], row_format: RowFormat, line_number: int) -> Row:
    """Check a row and give it the one shape that the rest of the library knows.

    Raises:
        BadRowError: it cannot be used.
    """
    missing = sorted(_KEYS[row_format] - values.keys())
    if missing:
        raise BadRowError(f"{', '.join(map(repr, missing))} missing, found {_found(values)}; {KNOWN_SHAPES}")
    row = _READERS[row_format](values, line_number)
    num_chars = len(row.text) + len(row.text_pair) + sum(len(one.content) for one in (*row.messages, *row.rejected))
    if num_chars > _MAX_CHARS:
        raise BadRowError(f"{num_chars} characters, a row has at most {_MAX_CHARS}; split it into several rows")
    return row


def _prompt_completion(values: Mapping[str, Any], line_number: int) -> Row:
    return Row(line_number, _exchange(values, "prompt", "completion"))


def _alpaca(values: Mapping[str, Any], line_number: int) -> Row:
    instruction, extra = _text(values["instruction"], "'instruction'"), values.get("input") or ""
    if extra:
        instruction = f"{instruction}\n\n{_text(extra, repr('input'))}"
    return Row(
        line_number, _exchange({"instruction": instruction, "output": values["output"]}, "instruction", "output")
    )


def _messages(values: Mapping[str, Any], line_number: int) -> Row:
    return Row(line_number, _conversation(values["messages"], "'messages'"))


def _sharegpt(values: Mapping[str, Any], line_number: int) -> Row:
    turns = values["conversations"]
    if not isinstance(turns, list):
        raise BadRowError(f"'conversations' is a JSON {json_name(turns)}; it must be a list of turns")
    messages = []
    for turn in turns:
        if not isinstance(turn, dict) or not {"from", "value"} <= turn.keys():
            raise BadRowError("a turn of 'conversations' is no object with 'from' and 'value'; mend or remove the row")
        role = _SHAREGPT_ROLES.get(_text(turn["from"], "a turn's 'from'"))
        if role is None:
            raise BadRowError(
                f"a turn is from {turn['from']!r}, known are {', '.join(_SHAREGPT_ROLES)}; rename or remove the row"
            )
        messages.append({"role": role, "content": turn["value"]})
    return Row(line_number, _conversation(messages, "'conversations'"))


def _preference(values: Mapping[str, Any], line_number: int) -> Row:
    conversations = []
    for key in ("chosen", "rejected"):
        answer = values[key]
        if isinstance(answer, list):
            prompt = values.get("prompt") or []
            conversation = _conversation([*prompt, *answer] if isinstance(prompt, list) else answer, repr(key))
            if conversation[-1].role != "assistant":
                raise BadRowError(f"{key!r} does not end with an assistant message; mend or remove the row")
            # Only the last turn is what was judged.
            *before, last = conversation
            conversations.append(
                (*(Message(m.role, m.content) for m in before), Message(last.role, last.content, True))
            )
        elif "prompt" not in values:
            raise BadRowError("'prompt' missing: 'chosen' and 'rejected' are answers to it; add it to the row")
        else:
            conversations.append(_exchange(values, "prompt", key))
    chosen, rejected = conversations
    if chosen == rejected:
        raise BadRowError("'chosen' and 'rejected' are equal; there is nothing to prefer: remove the row")
    names = ("reference_chosen_logps", "reference_rejected_logps")
    logps = None
    if all(values.get(name) is not None for name in names):
        logps = (_number(values[names[0]], repr(names[0])), _number(values[names[1]], repr(names[1])))
    return Row(line_number, chosen, rejected, reference_logps=logps)


def _rated(values: Mapping[str, Any], line_number: int) -> Row:
    rating = _number(values["rating"], "'rating'")
    return Row(line_number, _exchange(values, "prompt", "completion"), label=rating)


def _labelled(values: Mapping[str, Any], line_number: int) -> Row:
    label = values["label"]
    if isinstance(label, bool):
        label = str(label).lower()
    if not isinstance(label, str | int | float) or label == "":
        raise BadRowError(
            f"'label' is a JSON {json_name(label) if label != '' else 'empty string'}; give text or a number"
        )
    row = _plain(values, line_number)
    pair = values.get("text_pair")
    text_pair = "" if pair is None else _text(pair, "'text_pair'")
    return Row(line_number, text=row.text, text_pair=text_pair, label=label if isinstance(label, str) else float(label))


def _plain(values: Mapping[str, Any], line_number: int) -> Row:
    text = _text(values["text"], "'text'")
    if not text.strip():
        raise BadRowError("'text' is empty; there is nothing to learn: fill it or remove the row")
    return Row(line_number, text=text)


_READERS: dict[RowFormat, Callable[[Mapping[str, Any], int], Row]] = {
    "prompt_completion": _prompt_completion,
    "messages": _messages,
    "sharegpt": _sharegpt,
    "alpaca": _alpaca,
    "preference": _preference,
    "rated": _rated,
    "labelled": _labelled,
    "text": _plain,
}


def _exchange(values: Mapping[str, Any], prompt_key: str, answer_key: str) -> tuple[Message, ...]:
    prompt, answer = (_text(values[key], repr(key)) for key in (prompt_key, answer_key))
    if not prompt:
        raise BadRowError(f"{prompt_key!r} is empty; give the model something to answer or remove the row")
    if not answer.strip():
        raise BadRowError(f"{answer_key!r} is empty; there is nothing to learn: fill it or remove the row")
    return (Message("user", prompt), Message("assistant", answer, carries_loss=True))


def _conversation(values: Any, what: str) -> tuple[Message, ...]:
    if not isinstance(values, list):
        raise BadRowError(f"{what} is a JSON {json_name(values)}; it must be a list of messages")
    messages = tuple(_message(value) for value in values)
    if not any(message.role == "assistant" for message in messages):
        raise BadRowError("no message has the role 'assistant'; there is nothing to learn: add one or remove the row")
    if not any(message.carries_loss for message in messages):
        raise BadRowError("every assistant message has weight 0; there is nothing to learn: remove the row")
    return messages


def _message(value: Any) -> Message:
    if not isinstance(value, dict):
        raise BadRowError(f"a message is a JSON {json_name(value)}; it must be an object with 'role' and 'content'")
    missing = sorted({"role", "content"} - value.keys())
    if missing:
        raise BadRowError(f"{', '.join(map(repr, missing))} missing, found {_found(value)}; {KNOWN_SHAPES}")
    if value.get("tool_calls"):
        raise BadRowError("a message has 'tool_calls', which are not supported; write the call into 'content'")
    role = _text(value["role"], "a message's 'role'")
    content = _text(value["content"], "a message's 'content'")
    weight = value.get("weight", 1)
    if weight is None:  # a column of a table, where another row has a weight
        weight = 1
    if weight not in (0, 1):
        raise BadRowError("a message's 'weight' is neither 0 nor 1; give one of them or leave it out")
    if role == "assistant" and not content.strip():
        raise BadRowError("an assistant message is empty; there is nothing to learn: fill it or remove the row")
    return Message(role, content, carries_loss=role == "assistant" and bool(weight))


def _column(values: Mapping[str, Any], name: str) -> Any:
    if name not in values:
        raise BadRowError(f"data.columns asks for {name!r}, found {_found(values)}; correct data.columns")
    return values[name]


def _number(value: Any, what: str) -> float:
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise BadRowError(f"{what} is no finite number; correct or remove the row")
    return number


def _text(value: Any, what: str) -> str:
    if not isinstance(value, str):
        raise BadRowError(f"{what} is a JSON {json_name(value)}; it must be a string")
    try:
        # JSON can spell half of an emoji ("\ud83d"), which no encoding of the text has; tokenizers would raise later.
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadRowError(f"{what} holds half of a surrogate pair (a cut emoji?); mend the text") from error
    return value


def _found(values: Mapping[str, Any]) -> str:
    return ", ".join(repr(key) for key in sorted(values)) or "no keys"


def json_name(value: Any) -> str:
    """What JSON calls a value's type."""
    names = {dict: "object", list: "list", str: "string", bool: "boolean", type(None): "null"}
    return names.get(type(value), "number")


KNOWN_SHAPES = (
    'rows are {"prompt": ..., "completion": ...}, {"messages": [{"role": ..., "content": ...}, ...]}, '
    '{"conversations": [{"from": ..., "value": ...}, ...]}, {"instruction": ..., "output": ...}, '
    '{"prompt": ..., "chosen": ..., "rejected": ...}, {"prompt": ..., "completion": ..., "rating": ...}, '
    '{"text": ..., "label": ...} or {"text": ...}, all of one file alike; data.columns names other columns'
)
"""The end of a message about a row of unknown shape."""
