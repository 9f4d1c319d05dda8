"""Parts of a file that are tokenised elsewhere are the same bytes, and no more than some of its rows are ever held."""

from __future__ import annotations

import gc
import json
import tracemalloc

import numpy as np
import pytest

from coordinator.scheduling.ray_backend.token_tasks import run_token_task
from plutino.assets import TINY_LLAMA_DIR
from plutino.data.formats import Row
from plutino.data.readers import read_rows
from plutino.data.tokenisation import PartTokens, tokenise
from plutino.data.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(TINY_LLAMA_DIR)


def in_tasks(rows, reading):
    """As Ray's workers do it, without Ray: seven rows a task."""
    positions, lines = (np.array(numbers, np.int64) for numbers in rows.places())
    request = {
        "path": str(rows.path),
        "format": rows.format,
        "columns": dict(rows.columns),
        "model_dir": str(TINY_LLAMA_DIR),
        "reading": {name: getattr(reading, name) for name in ("max_tokens", "train_on", "use", "class_names")},
    }
    for first in range(0, len(rows), 7):
        ends = slice(first, first + 7)
        for part in run_token_task(json.dumps(request), positions[ends].tobytes(), lines[ends].tobytes()):
            yield PartTokens(**part)


@pytest.mark.parametrize(
    ("use", "row", "columns"),
    [
        ("answers", {"say": "what is {i}?", "then": "it is {i} or é"}, {"prompt": "Q: {say}", "completion": "then"}),
        ("pairs", {"prompt": "p {i}", "chosen": "yes {i}", "rejected": "no"}, {}),
        ("text", {"text": "a long text about {i} that goes on for a while, {i} again and again"}, {}),
        ("label", {"text": "row {i}", "label": "a"}, {}),
        ("scored", {"prompt": "p {i}", "completion": "c", "rating": 0.5}, {}),
    ],
)
def test_parts_tokenised_elsewhere_are_the_bytes_of_one_process(tmp_path, tokenizer, use, row, columns):
    path = tmp_path / "rows.jsonl"

    def line(i):
        made = {key: text.replace("{i}", str(i)) if isinstance(text, str) else text for key, text in row.items()}
        return json.dumps({**made, **({"label": "ab"[i % 2]} if "label" in made else {})}) + "\n\n" * (i % 3 == 0)

    path.write_text("".join(line(i) + "\n" for i in range(25)))
    rows = read_rows(path, columns=columns)
    options = {"max_tokens": 16, "use": use, "class_names": ("a", "b") if use == "label" else ()}
    here = tokenise(rows, tokenizer, **options)
    there = tokenise(rows, tokenizer, spread=in_tasks, **options)
    assert len(here) >= 25 and here.num_truncated == there.num_truncated
    for name in ("input_ids", "label_mask", "starts", "prompt_tokens", "line_numbers", "labels"):
        np.testing.assert_array_equal(getattr(here, name), getattr(there, name), err_msg=name)


@pytest.fixture
def wide_rows(tmp_path):
    """2000 rows of 8 KB each, nearly all of it in a column that is not used."""
    path = tmp_path / "rows.jsonl"
    with path.open("w") as file:
        for i in range(2000):
            file.write(json.dumps({"prompt": f"question {i}", "completion": "x", "not used": "word " * 1600}) + "\n")
    return path


def test_no_more_than_some_hundred_rows_are_held_at_a_time(wide_rows, tokenizer, monkeypatch):
    held = []
    encode = type(tokenizer).encode

    def counting(self, texts):
        if len(held) < 3:
            held.append(sum(isinstance(thing, Row) for thing in gc.get_objects()))
        return encode(self, texts)

    monkeypatch.setattr(type(tokenizer), "encode", counting)
    assert len(tokenise(read_rows(wide_rows), tokenizer, max_tokens=64)) == 2000
    assert 0 < max(held) <= 520


def test_file_is_never_held_whole(wide_rows, tokenizer):
    tracemalloc.start()
    try:
        samples = tokenise(read_rows(wide_rows), tokenizer, max_tokens=64)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(samples) == 2000
    # Most of it are the buffers of the file's hash.
    assert peak_bytes < wide_rows.stat().st_size / 3
