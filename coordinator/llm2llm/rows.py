"""Seed rows as their file has them, and rows of the same columns in a teacher's answer."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coordinator.llm2llm.rouge import words
from plutino.data.formats import BadRowError, Row, RowFormat, renamed, to_row
from plutino.data.readers import read_rows
from plutino.data.records import open_records
from plutino.data.sequences import class_name
from plutino.errors import ConfigError
from plutino.job.data import TaskConfig

_MOST_SEEDS = 20_000
_MOST_CHARS = 1 << 17
"""An answer is looked at no further than this."""
_MOST_OBJECTS = 256
_ASKING = ("prompt", "instruction", "input", "text", "text_pair")
_PLACEHOLDER = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True, slots=True)
class LoopRow:
    """A seed row or a new one."""

    values: dict[str, Any]
    """Its columns, as the file names them."""
    question: str
    """What is compared with other rows: the text without templates and without the answer."""
    prompt: str
    """What the student is asked."""
    answer: str
    line_number: int
    """Of a seed row; 0 for a new one."""

    @property
    def json(self) -> str:
        """One line of JSON, alike for equal rows."""
        return json.dumps(self.values, ensure_ascii=False, sort_keys=True)


@dataclass(frozen=True, slots=True)
class RowShape:
    """How rows of a job's file are read."""

    format: RowFormat
    columns: Mapping[str, str]
    example: Mapping[str, Any]
    """The columns of the first seed row."""

    @property
    def keys(self) -> tuple[str, ...]:
        """The columns of a row."""
        return tuple(self.example)

    def row(self, values: Mapping[str, Any], line_number: int = 0) -> LoopRow:
        """A row by its columns; without a line it is a new one.

        Raises:
            BadRowError: a job would refuse it; or it is new, and other than the first seed row lacks a column, has a
                value of another type, or asks nothing.
        """
        if line_number == 0:
            wrong = [key for key in self.keys if _type(values.get(key)) is not _type(self.example[key])]
            if wrong:
                raise BadRowError(f"{', '.join(wrong)} missing, or of another type than in the seed")
            values = {key: values[key] for key in self.keys}
        read = to_row(renamed(values, self.columns), self.format, line_number)
        row = LoopRow(dict(values), self._question(values, read), _prompt(read), _answer(read), line_number)
        if line_number == 0 and not words(row.question):
            raise BadRowError("it asks nothing")
        return row

    def _question(self, values: Mapping[str, Any], row: Row) -> str:
        names: list[str] = []
        for name in _ASKING:
            source = self.columns.get(name, name)
            names += _PLACEHOLDER.findall(source) if "{" in source else [source]
        texts = [text for name in names if isinstance(text := values.get(name), str)]
        return " ".join(texts) if texts else _prompt(row)


def read_seeds(source: TaskConfig) -> tuple[RowShape, list[LoopRow]]:
    """The seed rows of a job.

    Raises:
        DataError: the file cannot be read, or rows of it cannot be used.
        ConfigError: there are more of them than a loop holds.
    """
    assert source.train is not None, "a job's own rows are trained on"
    path = Path(source.train)
    rows = read_rows(path, source.format, source.limit, columns=source.columns)
    if len(rows) > _MOST_SEEDS:
        raise ConfigError(
            f"{path} has {len(rows)} rows, a loop starts from a small seed of at most {_MOST_SEEDS}; set data.limit"
        )
    records = open_records(path)
    shape: RowShape | None = None
    seeds: list[LoopRow] = []
    for place in records.places():
        values = records.read(place.position)
        shape = shape or RowShape(rows.format, dict(source.columns), values)
        seeds.append(shape.row(values, place.line_number))
        if len(seeds) == len(rows):
            break
    assert shape is not None, "read_rows refuses files without rows"
    return shape, seeds


def objects_in(text: str) -> Iterator[dict[str, Any]]:
    """The JSON objects of an answer, whatever stands around them."""
    decoder = json.JSONDecoder()
    text = text[:_MOST_CHARS]
    at = text.find("{")
    for _ in range(_MOST_OBJECTS):
        if at < 0:
            return
        try:
            value, end = decoder.raw_decode(text, at)
        except (ValueError, RecursionError):
            end = at + 1
        else:
            if isinstance(value, dict):
                yield value
        at = text.find("{", end)


def _type(value: Any) -> type:
    return float if type(value) is int else type(value)


def _prompt(row: Row) -> str:
    if row.messages:
        return "\n".join(message.content for message in row.messages[: row.last_answer])
    return f"{row.text}\n{row.text_pair}" if row.text_pair else row.text


def _answer(row: Row) -> str:
    if row.messages:
        return row.answer
    return "" if row.label is None else class_name(row.label)
