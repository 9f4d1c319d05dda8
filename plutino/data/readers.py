"""Rows of a training or held-out file, each with the line it came from.

Entry point: :func:`read_rows`. It looks at every row once, remembers where each stands, and reads it again when it is
asked for: memory holds two numbers a row. All bad lines of a file are reported at once, by their numbers.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Literal, overload

from plutino.data.formats import KNOWN_SHAPES, BadRowError, Message, Row, RowFormat, recognise, renamed, to_row
from plutino.data.records import Records, open_records
from plutino.errors import DataError

__all__ = ["Message", "Row", "RowFormat", "Rows", "name_lines", "read_rows", "scan_rows"]

_MAX_LINES_NAMED = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """The rows of one file, in its order."""

    path: Path
    format: RowFormat
    sha256: str
    """Hash of the whole file, also where only the first rows were asked for."""
    rows: Sequence[Row]
    problems: Mapping[str, Sequence[int]] = field(default_factory=dict)
    """What is wrong with rows that were left out -> their lines; empty unless they were to be passed over."""

    columns: Mapping[str, str] = field(default_factory=dict)
    """As :func:`read_rows` was given them."""

    def __len__(self) -> int:
        return len(self.rows)

    def places(self) -> tuple[Sequence[int], Sequence[int]] | None:
        """Where the rows stand in the file, and their lines; None: they are none of a file."""
        return self.rows.places if isinstance(self.rows, StoredRows) else None


class StoredRows(Sequence[Row]):
    """Rows that stay in their file until they are asked for.

    Args:
        path: the file, for messages.
        records: the file.
        row_format: what its columns mean.
        columns: see :func:`plutino.data.formats.renamed`.
        positions: where each row stands, see :class:`plutino.data.records.Place`.
        line_numbers: their lines.
    """

    def __init__(
        self,
        path: Path,
        records: Records,
        row_format: RowFormat,
        columns: Mapping[str, str],
        positions: Sequence[int],
        line_numbers: Sequence[int],
    ) -> None:
        self._path = path
        self._records = records
        self._format: RowFormat = row_format
        self._columns = columns
        self._positions = positions
        self._line_numbers = line_numbers

    def __len__(self) -> int:
        return len(self._positions)

    @property
    def places(self) -> tuple[Sequence[int], Sequence[int]]:
        """Positions and lines of the rows."""
        return self._positions, self._line_numbers

    @overload
    def __getitem__(self, index: int) -> Row: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[Row]: ...

    def __getitem__(self, index: int | slice) -> Row | Sequence[Row]:
        """A row, or a list of rows.

        Raises:
            DataError: the file is not what it was when it was scanned.
        """
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        line_number = self._line_numbers[index]
        try:
            values = renamed(self._records.read(self._positions[index]), self._columns)
            return to_row(values, self._format, line_number)
        except (BadRowError, OSError, StopIteration) as error:
            raise DataError(
                f"{self._path} changed while it was in use, line {line_number} cannot be read any more ({error}); "
                "put it back, or start the job again"
            ) from error


def read_rows(
    path: Path,
    format: RowFormat | Literal["auto"] = "auto",
    limit: int | None = None,
    *,
    columns: Mapping[str, str] = MappingProxyType({}),
) -> Rows:
    """Read a file of rows; empty lines are passed over.

    Args:
        path: jsonl, csv, tsv, txt, parquet, or a folder of Hugging Face datasets; text is UTF-8.
        format: what its columns mean; auto takes it from those of the first row.
        limit: read only the first so many rows; None means all.
        columns: the format's name of a column -> the file's, or a text with the file's columns in braces.

    Raises:
        DataError: the file cannot be read, has no rows, or some of its lines cannot be used. All unusable lines are
            counted, the first few are named.
    """
    rows = scan_rows(path, format, limit, columns=columns)
    if rows.problems:
        raise DataError(_report(path, rows.problems))
    return rows


def scan_rows(
    path: Path,
    format: RowFormat | Literal["auto"] = "auto",
    limit: int | None = None,
    *,
    columns: Mapping[str, str] = MappingProxyType({}),
) -> Rows:
    """As :func:`read_rows`, but rows that cannot be used are passed over and told in ``problems``.

    Raises:
        DataError: the file cannot be read, or no row is of a known format.
    """
    records = open_records(path)
    positions, line_numbers = array("q"), array("q")
    problems: dict[str, list[int]] = {}
    known: RowFormat | None = None if format == "auto" else format
    for place in records.places():
        try:
            values = renamed(records.read(place.position), columns)
            known = known or recognise(values)
            to_row(values, known, place.line_number)
        except BadRowError as problem:
            problems.setdefault(str(problem), []).append(place.line_number)
            continue
        positions.append(place.position)
        line_numbers.append(place.line_number)
        if len(positions) == limit:
            break
    if known is None:
        if problems:
            raise DataError(_report(path, problems))
        raise DataError(f"{path} has no rows; {KNOWN_SHAPES}")
    rows = StoredRows(path, records, known, dict(columns), positions, line_numbers)
    return Rows(path=path, format=known, sha256=records.sha256(), rows=rows, problems=problems, columns=dict(columns))


def rows_at(
    path: Path, format: RowFormat, columns: Mapping[str, str], positions: Sequence[int], line_numbers: Sequence[int]
) -> Rows:
    """Rows that somebody has found before, by their places; the file is not read through and has no hash here.

    Raises:
        DataError: the file cannot be read.
    """
    rows = StoredRows(path, open_records(path), format, columns, positions, line_numbers)
    return Rows(path=path, format=format, sha256="", rows=rows, columns=columns)


def name_lines(line_numbers: Sequence[int]) -> str:
    """Name the first few lines and count them all: ``lines 3, 7, 9, 12, 15 and 95 more (100 in all)``."""
    if len(line_numbers) == 1:
        return f"line {line_numbers[0]}"
    named = ", ".join(str(number) for number in line_numbers[:_MAX_LINES_NAMED])
    num_left = len(line_numbers) - _MAX_LINES_NAMED
    return f"lines {named}" + (f" and {num_left} more ({len(line_numbers)} in all)" if num_left > 0 else "")


def _report(path: Path, problems: Mapping[str, Sequence[int]]) -> str:
    num_bad = sum(len(lines) for lines in problems.values())
    details = [f"{name_lines(lines)}: {text}" for text, lines in problems.items()]
    return f"{path} has {num_bad} unusable row{'s' if num_bad > 1 else ''}:\n" + "\n".join(f"  {d}" for d in details)
