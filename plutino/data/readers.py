"""Rows of a training or held-out file, each with the line it came from.

Entry point: :func:`read_rows`. Two shapes of jsonl are known: ``{"prompt", "completion"}`` and OpenAI's
``{"messages": [{"role", "content"}, ...]}``. Both become messages; how the model sees a prompt and a completion is
decided in :mod:`plutino.data.templates`. All bad lines of a file are reported at once, by their numbers.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from plutino.errors import DataError

RowFormat = Literal["prompt_completion", "messages"]

_KEYS: dict[RowFormat, frozenset[str]] = {
    "prompt_completion": frozenset({"prompt", "completion"}),
    "messages": frozenset({"messages"}),
}
_MAX_LINES_NAMED = 5


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation."""

    role: str
    content: str
    carries_loss: bool = False
    """True for what the assistant says, unless the row gives the message OpenAI's ``"weight": 0``."""


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the file. At least one assistant message carries loss."""

    line_number: int
    """Counted from 1, as editors do."""
    messages: tuple[Message, ...]

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


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """The rows of one file, in its order."""

    path: Path
    format: RowFormat
    sha256: str
    """Hash of the whole file, also where only the first rows were asked for."""
    rows: tuple[Row, ...]

    def __len__(self) -> int:
        return len(self.rows)


def read_rows(path: Path, format: RowFormat | Literal["auto"] = "auto", limit: int | None = None) -> Rows:
    """Read a jsonl file; empty lines are passed over.

    Args:
        path: the file, UTF-8.
        format: the shape of its rows; auto takes it from the keys of the first row.
        limit: read only the first so many rows; None means all.

    Raises:
        DataError: the file cannot be read, has no rows, or some of its lines cannot be used. All unusable lines are
            counted, the first few are named.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read the data file {path}: {error.strerror}") from error
    rows: list[Row] = []
    problems: dict[str, list[int]] = {}
    known: RowFormat | None = None if format == "auto" else format
    for line_number, line in _lines(content):
        try:
            values = _parse(line)
            known = known or _recognise(values)
            messages = _READERS[known](values)
        except _BadRowError as problem:
            problems.setdefault(str(problem), []).append(line_number)
            continue
        rows.append(Row(line_number, messages))
        if len(rows) == limit:
            break
    if problems:
        raise DataError(_report(path, problems))
    if known is None:
        raise DataError(f"{path} has no rows ({len(content)} bytes); give a jsonl file with one JSON object per line")
    return Rows(path=path, format=known, sha256=hashlib.sha256(content).hexdigest(), rows=tuple(rows))


def name_lines(line_numbers: Sequence[int]) -> str:
    """Name the first few lines and count them all: ``lines 3, 7, 9, 12, 15 and 95 more (100 in all)``."""
    if len(line_numbers) == 1:
        return f"line {line_numbers[0]}"
    named = ", ".join(str(number) for number in line_numbers[:_MAX_LINES_NAMED])
    num_left = len(line_numbers) - _MAX_LINES_NAMED
    return f"lines {named}" + (f" and {num_left} more ({len(line_numbers)} in all)" if num_left > 0 else "")


class _BadRowError(Exception):
    """What is wrong with one line and the way out; equal texts are reported once with all their lines."""


def _lines(content: bytes) -> Iterator[tuple[int, bytes]]:
    # Not str.splitlines: it also splits at U+2028 and its kin, which JSON strings may hold.
    for line_number, line in enumerate(content.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if line.strip():
            yield line_number, line


def _report(path: Path, problems: Mapping[str, list[int]]) -> str:
    num_bad = sum(len(lines) for lines in problems.values())
    details = [f"{name_lines(lines)}: {text}" for text, lines in problems.items()]
    return f"{path} has {num_bad} unusable row{'s' if num_bad > 1 else ''}:\n" + "\n".join(f"  {d}" for d in details)


def _parse(line: bytes) -> dict[str, Any]:
    try:
        values = json.loads(line)
    except UnicodeDecodeError as error:
        raise _BadRowError("not UTF-8; save the file as UTF-8") from error
    except json.JSONDecodeError as error:
        raise _BadRowError(f"not JSON ({error.msg}); put one whole JSON object on each line") from error
    except RecursionError as error:
        raise _BadRowError("JSON nested too deeply; a row is an object of strings or of messages") from error
    if not isinstance(values, dict):
        raise _BadRowError(f"a JSON {_json_name(values)}, not an object; {_KNOWN_SHAPES}")
    return values


def _recognise(values: Mapping[str, Any]) -> RowFormat:
    for name, keys in _KEYS.items():
        if keys <= values.keys():
            return name
    found = ", ".join(repr(key) for key in sorted(values)) or "no keys"
    raise _BadRowError(f"found {found}; {_KNOWN_SHAPES}")


def _prompt_completion(values: Mapping[str, Any]) -> tuple[Message, ...]:
    _need(values, _KEYS["prompt_completion"])
    prompt, completion = (_text(values[key], repr(key)) for key in ("prompt", "completion"))
    if not prompt:
        raise _BadRowError("'prompt' is empty; give the model something to answer or remove the row")
    if not completion.strip():
        raise _BadRowError("'completion' is empty; there is nothing to learn: fill it or remove the row")
    return (Message("user", prompt), Message("assistant", completion, carries_loss=True))


def _conversation(values: Mapping[str, Any]) -> tuple[Message, ...]:
    _need(values, _KEYS["messages"])
    if not isinstance(values["messages"], list):
        raise _BadRowError(f"'messages' is a JSON {_json_name(values['messages'])}; it must be a list of messages")
    messages = tuple(_message(value) for value in values["messages"])
    if not any(message.role == "assistant" for message in messages):
        raise _BadRowError("no message has the role 'assistant'; there is nothing to learn: add one or remove the row")
    if not any(message.carries_loss for message in messages):
        raise _BadRowError("every assistant message has weight 0; there is nothing to learn: remove the row")
    return messages


_READERS = {"prompt_completion": _prompt_completion, "messages": _conversation}


def _message(value: Any) -> Message:
    if not isinstance(value, dict):
        raise _BadRowError(f"a message is a JSON {_json_name(value)}; it must be an object with 'role' and 'content'")
    _need(value, frozenset({"role", "content"}))
    if value.get("tool_calls"):
        raise _BadRowError("a message has 'tool_calls', which are not supported; write the call into 'content'")
    role = _text(value["role"], "a message's 'role'")
    content = _text(value["content"], "a message's 'content'")
    weight = value.get("weight", 1)
    if weight not in (0, 1):
        raise _BadRowError("a message's 'weight' is neither 0 nor 1; give one of them or leave it out")
    if role == "assistant" and not content.strip():
        raise _BadRowError("an assistant message is empty; there is nothing to learn: fill it or remove the row")
    return Message(role, content, carries_loss=role == "assistant" and bool(weight))


def _need(values: Mapping[str, Any], keys: frozenset[str]) -> None:
    missing = sorted(keys - values.keys())
    if missing:
        found = ", ".join(repr(key) for key in sorted(values)) or "no keys"
        raise _BadRowError(f"{', '.join(repr(key) for key in missing)} missing, found {found}; {_KNOWN_SHAPES}")


def _text(value: Any, what: str) -> str:
    if not isinstance(value, str):
        raise _BadRowError(f"{what} is a JSON {_json_name(value)}; it must be a string")
    try:
        # JSON can spell half of an emoji ("\ud83d"), which no encoding of the text has; tokenizers would raise later.
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise _BadRowError(f"{what} holds half of a surrogate pair (a cut emoji?); mend the text") from error
    return value


_KNOWN_SHAPES = (
    'rows are {"prompt": ..., "completion": ...} or {"messages": [{"role": ..., "content": ...}, ...]}, '
    "all of one file alike"
)


def _json_name(value: Any) -> str:
    names = {dict: "object", list: "list", str: "string", bool: "boolean", type(None): "null"}
    return names.get(type(value), "number")
