from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from plutino.data.readers import RowFormat, Rows, read_rows, scan_rows
from plutino.errors import DataError

TURNS = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
WORSE = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "go away"}]


def read(tmp_path: Path, *rows: dict[str, Any], **options: Any) -> Rows:
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return read_rows(path, **options)


def told(row: Any) -> list[tuple[str, str]]:
    return [(message.role, message.content) for message in row.messages]


@pytest.mark.parametrize(
    ("row", "found"),
    [
        ({"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]}, "sharegpt"),
        ({"instruction": "hi", "input": "", "output": "hello"}, "alpaca"),
        ({"prompt": "hi", "completion": "hello", "rating": 0.5}, "rated"),
        ({"prompt": "hi", "completion": "hello", "reward": 1}, "rated"),
        ({"prompt": "hi", "chosen": "hello", "rejected": "go away"}, "preference"),
        ({"prompt": TURNS[:1], "chosen": TURNS[1:], "rejected": WORSE[1:]}, "preference"),
        ({"chosen": TURNS, "rejected": WORSE}, "preference"),
    ],
)
def test_conversations_of_every_shape_become_the_same_messages(tmp_path: Path, row: dict[str, Any], found: str) -> None:
    rows = read(tmp_path, row)

    assert rows.format == found
    assert told(rows.rows[0]) == [("user", "hi"), ("assistant", "hello")]
    assert [message.carries_loss for message in rows.rows[0].messages] == [False, True]
    if found == "preference":
        assert [message.content for message in rows.rows[0].rejected] == ["hi", "go away"]
    if found == "rated":
        assert rows.rows[0].label == row.get("rating", row.get("reward"))


def test_alpaca_input_follows_the_instruction(tmp_path: Path) -> None:
    row = read(tmp_path, {"instruction": "Add.", "input": "1 and 2", "output": "3"}).rows[0]

    assert row.messages[0].content == "Add.\n\n1 and 2"


@pytest.mark.parametrize(
    "row",
    [
        {"text": "a", "text_pair": "b", "label": 1},
        {"sentence1": "a", "sentence2": "b", "label": 1},
        {"premise": "a", "hypothesis": "b", "label": 1},
    ],
)
def test_labelled_pairs_are_known_by_the_names_of_well_known_data_sets(tmp_path: Path, row: dict[str, Any]) -> None:
    rows = read(tmp_path, row)

    assert rows.format == "labelled"
    assert (rows.rows[0].text, rows.rows[0].text_pair, rows.rows[0].label) == ("a", "b", 1.0)


def test_columns_rename_and_fill_templates(tmp_path: Path) -> None:
    columns = {"prompt": "Intent of '{text}'?", "completion": "intent"}

    rows = read(tmp_path, {"text": "play it", "intent": "PlayMusic"}, columns=columns)

    assert rows.format == "prompt_completion"
    assert told(rows.rows[0]) == [("user", "Intent of 'play it'?"), ("assistant", "PlayMusic")]


def test_a_stated_format_wins_over_what_the_columns_look_like(tmp_path: Path) -> None:
    assert read(tmp_path, {"text": "a", "label": "b"}, format="text").rows[0].label is None


@pytest.mark.parametrize(
    ("row_format", "row", "told"),
    [
        ("text", {"text": ""}, "'text' is empty"),
        ("labelled", {"text": "a", "label": None}, "'label' is a JSON null"),
        ("labelled", {"text": "a", "label": ""}, "'label' is a JSON empty string"),
        ("labelled", {"text": "a"}, "'label' missing, found 'text'"),
        ("rated", {"prompt": "a", "completion": "b", "rating": "good"}, "'rating' is no finite number"),
        ("preference", {"prompt": "a", "chosen": "b", "rejected": "b"}, "'chosen' and 'rejected' are equal"),
        ("preference", {"chosen": "b", "rejected": "c"}, "'prompt' missing"),
        ("sharegpt", {"conversations": [{"from": "robot", "value": "x"}]}, "a turn is from 'robot'"),
        ("sharegpt", {"conversations": ["x"]}, "no object with 'from' and 'value'"),
    ],
)
def test_unusable_rows_say_what_is_wrong_and_where(
    tmp_path: Path, row_format: RowFormat, row: dict[str, Any], told: str
) -> None:
    with pytest.raises(DataError, match=f"line 1: .*{told}"):
        read(tmp_path, row, format=row_format)


def test_a_column_that_is_not_there_is_named_with_those_that_are(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"line 1: data.columns asks for 'intent', found 'text'"):
        read(tmp_path, {"text": "a"}, columns={"label": "intent"})


def test_scan_passes_over_unusable_rows_and_tells_their_lines(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text('{"text": "a"}\nnonsense\n{"text": ""}\n{"text": "b"}\nmore nonsense\n')

    rows = scan_rows(path)

    assert [row.line_number for row in rows.rows] == [1, 4]
    lines = sorted(line for lines in rows.problems.values() for line in lines)
    assert lines == [2, 3, 5]


def test_csv_with_quoted_line_breaks_mark_and_a_short_row(tmp_path: Path) -> None:
    path = tmp_path / "data.csv"
    path.write_bytes(b'\xef\xbb\xbftext,label\r\n"one\r\nand two",x\r\nthree\r\n\r\nfour,"y, z"\r\n')

    rows = scan_rows(path)

    assert [(row.line_number, row.text, row.label) for row in rows.rows] == [
        (2, "one\r\nand two", "x"),
        (6, "four", "y, z"),
    ]
    assert [(text, list(lines)) for text, lines in rows.problems.items()] == [
        ("1 values for the 2 columns of the first line; mend the row", [4])
    ]
    assert rows.rows[1] == rows.rows[-1]


def test_tsv_and_plain_text_are_read(tmp_path: Path) -> None:
    table, text = tmp_path / "data.tsv", tmp_path / "data.txt"
    table.write_text("prompt\tcompletion\nhi\thello\n")
    text.write_text("\nFirst line\nand second.\n\n\n  \nSecond paragraph.")

    assert read_rows(table).format == "prompt_completion"
    rows = read_rows(text)
    assert [(row.line_number, row.text) for row in rows.rows] == [
        (2, "First line\nand second."),
        (7, "Second paragraph."),
    ]


def test_a_file_that_changed_under_the_job_is_not_read_as_something_else(tmp_path: Path) -> None:
    rows = read(tmp_path, {"text": "a" * 40}, {"text": "b"})
    rows.path.write_text('{"text": "c"}\n' * 3)

    with pytest.raises(DataError, match="changed while it was in use, line 2"):
        rows.rows[1]


def test_parquet_is_read_row_group_by_row_group(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="pip install 'plutino[parquet]'")
    from pyarrow import parquet

    table = pyarrow.table({"text": [f"row {n}" for n in range(7)], "label": list("abcabca")})
    parquet.write_table(table, tmp_path / "data.parquet", row_group_size=3)

    rows = read_rows(tmp_path / "data.parquet", limit=6)

    assert [(row.line_number, row.text, row.label) for row in rows.rows[2:4]] == [(3, "row 2", "c"), (4, "row 3", "a")]
    assert len(rows) == 6 and rows.rows[0].text == "row 0"


def test_a_folder_of_datasets_is_read_and_one_of_splits_asks_which(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="pip install 'plutino[datasets]'")
    pyarrow = pytest.importorskip("pyarrow", reason="pip install 'plutino[datasets]'")
    table = pyarrow.table({"prompt": ["hi", "ho"], "completion": ["hello", "off we go"]})
    # A stated fingerprint: datasets 5.2 cannot hash tables of pyarrow 26.
    split = datasets.Dataset(datasets.table.InMemoryTable(table), fingerprint="rows")
    split.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": split}).save_to_disk(tmp_path / "several")

    assert told(read_rows(tmp_path / "one").rows[1]) == [("user", "ho"), ("assistant", "off we go")]
    with pytest.raises(DataError, match=r"holds the splits train; name one: .*several.train"):
        read_rows(tmp_path / "several")
    assert len(read_rows(tmp_path / "several" / "train")) == 2


def test_rows_too_long_to_be_held_are_told_by_line_and_those_behind_them_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines, text = tmp_path / "data.jsonl", tmp_path / "data.txt"
    long_row = {"text": "x" * (1 << 22) + "y"}
    lines.write_text("\n".join(json.dumps(row) for row in ({"text": "a"}, long_row, {"text": "b"})))
    text.write_text("a\n\n" + "many words\n" * 50 + "\nb\n")

    for path in (lines, text):
        if path == text:
            monkeypatch.setattr("plutino.data.records._MAX_ROW_BYTES", 99)
        rows = scan_rows(path)
        assert [row.text for row in rows.rows] == ["a", "b"]
        ((problem, bad_lines),) = rows.problems.items()
        assert list(bad_lines) == [2 if path == lines else 3] and "split it into several rows" in problem
    assert list(scan_rows(lines).problems.values()) == [[2]], "of a line that is too long only the beginning is held"


def test_a_json_list_of_rows_is_refused_with_the_way_to_lines(tmp_path: Path) -> None:
    for name, indent in (("alpaca.json", None), ("alpaca.jsonl", 2)):
        path = tmp_path / name
        path.write_text(json.dumps([{"instruction": "hi", "output": "hello"}], indent=indent))
        with pytest.raises(DataError, match=r"one JSON list; .*jq -c '.\[\]' alpaca.jsonl? > alpaca-rows.jsonl"):
            read_rows(path)


def test_csv_of_semicolons_is_read_and_commas_win_where_both_are(tmp_path: Path) -> None:
    path = tmp_path / "data.csv"
    path.write_text('prompt;completion\n"a; b, c";d\n')
    assert told(read_rows(path).rows[0]) == [("user", "a; b, c"), ("assistant", "d")]

    path.write_text("prompt,completion,a;b\nhi,hello,c\n")
    assert told(read_rows(path).rows[0]) == [("user", "hi"), ("assistant", "hello")]
