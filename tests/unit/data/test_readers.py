from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from plutino.data.readers import Rows, name_lines, read_rows
from plutino.errors import DataError

CHAT = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]}
PAIR = {"prompt": "2 + 2 =", "completion": " 4"}


def write(path: Path, *rows: object) -> Path:
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows), encoding="utf-8")
    return path


def read(tmp_path: Path, *rows: object) -> Rows:
    return read_rows(write(tmp_path / "data.jsonl", *rows))


@pytest.mark.parametrize(("row", "found"), [(CHAT, "messages"), (PAIR, "prompt_completion")])
def test_read_rows_auto_recognises_the_shape_by_its_keys(tmp_path: Path, row: object, found: str) -> None:
    rows = read(tmp_path, row)

    assert rows.format == found
    assert [message.role for message in rows.rows[0].messages] == ["user", "assistant"]
    assert [message.carries_loss for message in rows.rows[0].messages] == [False, True]


def test_read_rows_keeps_the_line_number_over_empty_lines(tmp_path: Path) -> None:
    rows = read(tmp_path, CHAT, "", "   ", CHAT)

    assert [row.line_number for row in rows.rows] == [1, 4]


def test_read_rows_limit_keeps_the_first_rows_and_hashes_the_whole_file(tmp_path: Path) -> None:
    path = write(tmp_path / "data.jsonl", PAIR, PAIR, "not read, so not judged")

    rows = read_rows(path, limit=2)

    assert len(rows) == 2
    assert rows.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_read_rows_line_separator_inside_a_string_does_not_split_the_row(tmp_path: Path) -> None:
    text = '{"prompt": "a\u2028b", "completion": "c"}'

    rows = read(tmp_path, text)

    assert rows.rows[0].messages[0].content == "a\u2028b"


def test_read_rows_file_with_crlf_and_byte_order_mark_is_read(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(PAIR).encode() + b"\r\n")

    assert read_rows(path).rows[0].answer == " 4"


def test_read_rows_weight_zero_takes_the_loss_from_an_assistant_message(tmp_path: Path) -> None:
    silent = {"role": "assistant", "content": "no", "weight": 0}
    rows = read(tmp_path, {"messages": [*CHAT["messages"], {"role": "user", "content": "and?"}, silent]})

    assert [message.carries_loss for message in rows.rows[0].messages] == [False, True, False, False]
    assert rows.rows[0].answer == "no"


@pytest.mark.parametrize(
    ("bad", "told"),
    [
        ("{", "not JSON"),
        ("[1]", "a JSON list"),
        ({"question": "a", "answer": "b"}, "found 'answer', 'question'"),
        ({"prompt": "a", "completion": " "}, "'completion' is empty"),
        ({"prompt": "\ud83d", "completion": "a"}, "half of a surrogate pair"),
        ({"prompt": "", "completion": "a"}, "'prompt' is empty"),
        ({"prompt": "a", "completion": None}, "'completion' is a JSON null"),
        ({"messages": "hi"}, "must be a list"),
        ({"messages": [{"role": "user", "content": "hi"}]}, "no message has the role 'assistant'"),
        ({"messages": [{"role": "assistant", "content": ""}]}, "an assistant message is empty"),
        ({"messages": [{"role": "assistant", "content": "x", "weight": 0}]}, "weight 0"),
        ({"messages": [{"role": "assistant", "content": "x", "weight": "y"}]}, "neither 0 nor 1"),
        ({"messages": [{"role": "assistant"}]}, "'content' missing, found 'role'"),
        ({"messages": [{"role": "assistant", "content": [{"type": "text"}]}]}, "must be a string"),
        ({"messages": [{"role": "assistant", "content": "", "tool_calls": [{}]}]}, "tool_calls"),
    ],
)
def test_read_rows_unusable_row_names_file_line_and_trouble(tmp_path: Path, bad: object, told: str) -> None:
    with pytest.raises(DataError) as caught:
        read(tmp_path, bad)

    assert "data.jsonl has 1 unusable row" in str(caught.value)
    assert "line 1: " in str(caught.value)
    assert told in str(caught.value)


def test_read_rows_many_bad_rows_are_counted_and_the_first_named(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        read(tmp_path, PAIR, *["{"] * 100, {"prompt": "a"})

    assert "101 unusable rows" in str(caught.value)
    assert "lines 2, 3, 4, 5, 6 and 95 more (100 in all): not JSON" in str(caught.value)
    assert "line 102: 'completion' missing, found 'prompt'" in str(caught.value)


def test_read_rows_stated_format_refuses_the_other_shape(tmp_path: Path) -> None:
    path = write(tmp_path / "data.jsonl", PAIR)

    with pytest.raises(DataError, match="'messages' missing, found 'completion', 'prompt'"):
        read_rows(path, "messages")


def test_read_rows_bytes_that_are_not_utf8_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes('{"prompt": "é"}'.encode("latin-1"))

    with pytest.raises(DataError, match="not UTF-8"):
        read_rows(path)


def test_read_rows_empty_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has no rows"):
        read(tmp_path)


def test_read_rows_missing_file_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere\.jsonl: No such file"):
        read_rows(tmp_path / "nowhere.jsonl")


def test_name_lines_up_to_five_names_them_all() -> None:
    assert name_lines([3]) == "line 3"
    assert name_lines([1, 2, 3, 4, 5]) == "lines 1, 2, 3, 4, 5"
