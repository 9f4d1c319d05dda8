"""Rows of a file as the file has them, one at a time and by position, so that no file has to fit into memory.

Entry point: :func:`open_records`. Known are jsonl, csv and tsv, plain text (a paragraph is a row), parquet (needs
pyarrow) and folders written by Hugging Face datasets (need that package).
"""

from __future__ import annotations

import csv
import hashlib
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from plutino.data.formats import KNOWN_SHAPES, BadRowError, json_name
from plutino.errors import DataError

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_HASHED_BYTES = 1 << 20
_NOT_UTF8 = "not UTF-8; save the file as UTF-8"
_MAX_ROW_BYTES = 64 << 20
"""A line or paragraph beyond it is never held: one without an end would be as large as its file."""
_TOO_LONG = f"longer than {_MAX_ROW_BYTES >> 20} MiB; split it into several rows"
_START_OF_LIST = re.compile(rb"\s*\[\s*(\{|$)")


@dataclass(frozen=True, slots=True)
class Place:
    """Where a row stands."""

    position: int
    """What :meth:`Records.read` finds it by: a byte offset, or a row number."""
    line_number: int
    """Counted from 1; the number of the row where a file has no lines."""


class Records(Protocol):
    """The rows of one file."""

    def places(self) -> Iterator[Place]:
        """Where each row stands, in the file's order."""

    def read(self, position: int) -> dict[str, Any]:
        """A row's columns.

        Raises:
            BadRowError: they cannot be read.
        """

    def sha256(self) -> str:
        """Hash of the whole file."""


def open_records(path: Path) -> Records:
    """Open a file by its ending; what has no known one is read as jsonl.

    Raises:
        DataError: the file cannot be read, or a package that reads it is missing.
    """
    if path.is_dir():
        return _DatasetFolder(path)
    kinds: dict[str, Callable[[Path], Records]] = {
        ".csv": CsvFile,
        ".tsv": CsvFile,
        ".txt": TextFile,
        ".parquet": _ParquetFile,
    }
    try:
        path.open("rb").close()
    except OSError as error:
        raise DataError(f"cannot read the data file {path}: {error.strerror}") from error
    return kinds.get(path.suffix.lower(), JsonLines)(path)


class _ByteFile:
    """A file whose rows begin at byte offsets."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def sha256(self) -> str:
        return _sha256([self._path])

    def _lines(self, position: int = 0) -> Iterator[tuple[int, int, bytes]]:
        """Start, end and content of each line from a position on; a byte order mark is no part of the content.

        Of a line that is too long comes only its beginning, with more than ``_MAX_ROW_BYTES`` bytes.
        """
        with self._path.open("rb") as file:
            file.seek(position)
            # Bytes end at \n alone. Text would also end at U+2028 and its kin, which JSON strings may hold.
            while line := file.readline(_MAX_ROW_BYTES + 1):
                start, position, rest = position, position + len(line), line
                while len(rest) > _MAX_ROW_BYTES and not rest.endswith(b"\n"):
                    rest = file.readline(_MAX_ROW_BYTES + 1)
                    position += len(rest)
                yield start, position, line.removeprefix(_BYTE_ORDER_MARK) if start == 0 else line


class JsonLines(_ByteFile):
    """One JSON object on each line; empty lines are passed over."""

    def places(self) -> Iterator[Place]:
        """See :class:`Records`.

        Raises:
            DataError: the file is one JSON list of rows.
        """
        is_first = True
        for line_number, (position, _, line) in enumerate(self._lines(), start=1):
            if not line.strip():
                continue
            if is_first and _START_OF_LIST.match(line):
                raise DataError(
                    f"{self._path} is one JSON list; put one object on each line: "
                    f"jq -c '.[]' {self._path.name} > {self._path.stem}-rows.jsonl"
                )
            is_first = False
            yield Place(position, line_number)

    def read(self, position: int) -> dict[str, Any]:
        """See :class:`Records`."""
        _, _, line = next(self._lines(position))
        if len(line) > _MAX_ROW_BYTES:
            raise BadRowError(_TOO_LONG)
        try:
            values = json.loads(line)
        except UnicodeDecodeError as error:
            raise BadRowError(_NOT_UTF8) from error
        except json.JSONDecodeError as error:
            raise BadRowError(f"not JSON ({error.msg}); put one whole JSON object on each line") from error
        except RecursionError as error:
            raise BadRowError("JSON nested too deeply; a row is an object of strings or of messages") from error
        if not isinstance(values, dict):
            raise BadRowError(f"a JSON {json_name(values)}, not an object; {KNOWN_SHAPES}")
        return values


class CsvFile(_ByteFile):
    """Comma-separated values (tabs in a .tsv) below a line of names; a quoted value may span lines.

    Semicolons part them if the line of names has these and no comma, as spreadsheets write in much of Europe.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        first_line = next(self._lines(), (0, 0, b""))[2]
        self._delimiter = ";" if b";" in first_line and b"," not in first_line else ","
        if path.suffix.lower() == ".tsv":
            self._delimiter = "\t"
        self._names, self._num_header_lines = self._header()

    def places(self) -> Iterator[Place]:
        """See :class:`Records`."""
        lines = _CountedLines(self._lines())
        reader = csv.reader(lines, delimiter=self._delimiter)
        while True:
            position, line_number = lines.end, lines.num_lines + 1
            try:
                fields = next(reader)
            except StopIteration:
                return
            except csv.Error:  # read raises it for this row alone, with its line
                fields = [""]
            if line_number > self._num_header_lines and fields:
                yield Place(position, line_number)

    def read(self, position: int) -> dict[str, Any]:
        """See :class:`Records`."""
        lines = _CountedLines(self._lines(position))
        try:
            fields = next(csv.reader(lines, delimiter=self._delimiter))
        except csv.Error as error:
            raise BadRowError(f"not csv ({error}); mend the quotes, or write long texts as jsonl") from error
        if lines.has_bad_bytes:
            raise BadRowError(_NOT_UTF8)
        if len(fields) != len(self._names):
            raise BadRowError(
                f"{len(fields)} values for the {len(self._names)} columns of the first line; mend the row"
            )
        return dict(zip(self._names, fields, strict=True))

    def _header(self) -> tuple[list[str], int]:
        lines = _CountedLines(self._lines())
        try:
            names = next(csv.reader(lines, delimiter=self._delimiter), [])
        except csv.Error as error:
            raise DataError(f"the first line of {self._path} is not csv ({error}); it must name the columns") from error
        if not names or len(set(names)) != len(names) or lines.has_bad_bytes:
            raise DataError(
                f"the first line of {self._path} must name the columns in UTF-8, each once; found {names or 'nothing'}"
            )
        return names, lines.num_lines


class _CountedLines:
    """Text lines for csv's reader, which asks for one line at a time, with where they end."""

    def __init__(self, lines: Iterator[tuple[int, int, bytes]]) -> None:
        self._lines = lines
        self.end = 0
        self.num_lines = 0
        self.has_bad_bytes = False

    def __iter__(self) -> _CountedLines:
        return self

    def __next__(self) -> str:
        _, self.end, line = next(self._lines)
        self.num_lines += 1
        text = line.decode("utf-8", errors="replace")
        self.has_bad_bytes |= "\ufffd" in text and "\ufffd".encode() not in line
        return text


class TextFile(_ByteFile):
    """Plain text: paragraphs, which empty lines part, are the rows."""

    def places(self) -> Iterator[Place]:
        """See :class:`Records`."""
        is_inside = False
        for line_number, (position, _, line) in enumerate(self._lines(), start=1):
            if line.strip() and not is_inside:
                yield Place(position, line_number)
            is_inside = bool(line.strip())

    def read(self, position: int) -> dict[str, Any]:
        """See :class:`Records`."""
        lines, num_bytes = [], 0
        for _, _, line in self._lines(position):
            if not line.strip():
                break
            lines.append(line)
            num_bytes += len(line)
            if num_bytes > _MAX_ROW_BYTES:
                raise BadRowError(f"a paragraph {_TOO_LONG}, with empty lines between them")
        try:
            return {"text": b"".join(lines).decode("utf-8").rstrip("\r\n")}
        except UnicodeDecodeError as error:
            raise BadRowError(_NOT_UTF8) from error


class _ParquetFile:
    """Rows of a parquet file; one row group is held at a time."""

    def __init__(self, path: Path) -> None:
        try:
            from pyarrow import ArrowInvalid, parquet
        except ImportError as error:
            raise DataError(
                f"{path} needs pyarrow to be read: pip install 'plutino[parquet]', or convert it to jsonl"
            ) from error
        try:
            self._file = parquet.ParquetFile(path)
        except ArrowInvalid as error:
            raise DataError(f"{path} is no parquet file: {error}; write it again") from error
        self._path = path
        self._group: tuple[int, Any] = (-1, None)
        sizes = [self._file.metadata.row_group(group).num_rows for group in range(self._file.num_row_groups)]
        self._starts = [sum(sizes[:group]) for group in range(len(sizes))]

    def sha256(self) -> str:
        return _sha256([self._path])

    def places(self) -> Iterator[Place]:
        for row in range(self._file.metadata.num_rows):
            yield Place(row, row + 1)

    def read(self, position: int) -> dict[str, Any]:
        group = max(g for g, start in enumerate(self._starts) if start <= position)
        if self._group[0] != group:
            self._group = (group, None)  # the old one is let go before the next is read
            self._group = (group, self._file.read_row_group(group))
        row: dict[str, Any] = self._group[1].slice(position - self._starts[group], 1).to_pylist()[0]
        return row


class _DatasetFolder:
    """A split that datasets' save_to_disk wrote, memory-mapped."""

    def __init__(self, path: Path) -> None:
        try:
            import datasets
        except ImportError as error:
            raise DataError(
                f"{path} is a folder, which needs datasets to be read: pip install 'plutino[datasets]', or give a file"
            ) from error
        try:
            found = datasets.load_from_disk(str(path))
        except FileNotFoundError as error:
            raise DataError(f"{path} is no folder that datasets' save_to_disk wrote; give one, or a file") from error
        if isinstance(found, datasets.DatasetDict):
            raise DataError(f"{path} holds the splits {', '.join(found)}; name one: {path / next(iter(found), '')}")
        self._path, self._rows = path, found

    def sha256(self) -> str:
        return _sha256(sorted(path for path in self._path.iterdir() if path.is_file()))

    def places(self) -> Iterator[Place]:
        for row in range(len(self._rows)):
            yield Place(row, row + 1)

    def read(self, position: int) -> dict[str, Any]:
        return dict(self._rows[position])


def _sha256(paths: list[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while part := file.read(_HASHED_BYTES):
                digest.update(part)
    return digest.hexdigest()
