"""General text in windows, and held-out rows behind examples."""

from __future__ import annotations

import numpy as np
import pytest

from plutino.assets import GENERAL_TEXT, TINY_LLAMA_DIR
from plutino.data.few_shot import with_examples
from plutino.data.general_text import SCORED_TOKENS, read_general_text
from plutino.data.readers import Message, Row, Rows
from plutino.data.tokenizer import load_tokenizer
from plutino.errors import DataError


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(TINY_LLAMA_DIR)


@pytest.mark.parametrize(("row_tokens", "label_tokens"), [(40, 6), (128, 127), (64, 500)])
def test_each_scored_token_counts_once_and_no_window_exceeds_a_row_of_the_job(tokenizer, row_tokens, label_tokens):
    samples = read_general_text(GENERAL_TEXT, tokenizer, row_tokens=row_tokens, label_tokens=label_tokens).samples
    ids = np.array(tokenizer.encode([GENERAL_TEXT.read_text()])[0].ids)
    scored = min(label_tokens, row_tokens - 1)
    assert set(samples.lengths.tolist()) == {row_tokens}
    found = [samples.ids(row)[samples.mask(row).astype(bool)] for row in range(len(samples))]
    assert all(len(one) == scored for one in found)
    first = row_tokens - scored
    joined = np.concatenate(found)
    assert joined.tolist() == ids[first : first + len(joined)].tolist()
    assert len(joined) >= SCORED_TOKENS
    # Whatever the job's own loss is the mean over.
    assert samples.counted == "label tokens"


def test_text_that_is_shorter_than_a_window_or_no_text_is_refused(tokenizer, tmp_path):
    short = tmp_path / "short.txt"
    short.write_text("Now is the winter")
    with pytest.raises(DataError, match="give a longer text"):
        read_general_text(short, tokenizer, row_tokens=64, label_tokens=8)
    short.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="not UTF-8"):
        read_general_text(short, tokenizer, row_tokens=64, label_tokens=8)


def rows_of(tmp_path, *pairs):
    rows = tuple(
        Row(number, (Message("user", question), Message("assistant", answer, carries_loss=True)))
        for number, (question, answer) in enumerate(pairs, start=1)
    )
    return Rows(path=tmp_path / "rows.jsonl", format="prompt_completion", sha256="", rows=rows)


def test_examples_are_whole_training_rows_before_each_held_out_one_and_its_answer_stays(tmp_path):
    train = rows_of(tmp_path, *((f"q{i}", f"a{i}") for i in range(20)))
    held_out = rows_of(tmp_path, ("new", "truth"), ("other", "fact"))
    chat = with_examples(held_out, train, num_examples=3, seed=4, is_chat=True)
    texts = [[message.content for message in row.messages] for row in chat.rows]
    assert [row[-2:] for row in texts] == [["new", "truth"], ["other", "fact"]]
    assert texts[0][:6] == texts[1][:6] and len(texts[0]) == 8
    assert all(text.replace("q", "a") == answer for text, answer in zip(texts[0][0:6:2], texts[0][1:6:2], strict=True))
    plain = with_examples(held_out, train, num_examples=3, seed=4, is_chat=False)
    assert (
        plain.rows[0].question
        == "".join(f"{q}{a}\n\n" for q, a in zip(texts[0][0:6:2], texts[0][1:6:2], strict=True)) + "new"
    )
    assert [row.answer for row in plain.rows] == ["truth", "fact"]
