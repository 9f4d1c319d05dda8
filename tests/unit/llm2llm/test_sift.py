from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.llm2llm import sift
from coordinator.llm2llm.rouge import KnownTexts, rouge_l, words
from coordinator.llm2llm.rows import objects_in, read_seeds
from coordinator.llm2llm.sift import Sieve, same_answer
from plutino.job.data import TaskConfig

WORDS = st.lists(st.sampled_from(["a", "b", "c", "d"]), max_size=9)


def longest_common(first, second):
    table = [[0] * (len(second) + 1) for _ in range(len(first) + 1)]
    for i, x in enumerate(first):
        for j, y in enumerate(second):
            table[i + 1][j + 1] = table[i][j] + 1 if x == y else max(table[i][j + 1], table[i + 1][j])
    return table[-1][-1]


@given(WORDS, WORDS)
def test_rouge_l_is_the_f1_of_the_longest_common_subsequence(first, second):
    if first and second:
        common = longest_common(first, second)
        precision, recall = common / len(second), common / len(first)
        f1 = 2 * precision * recall / (precision + recall) if common else 0.0
        assert rouge_l(first, second) == pytest.approx(f1)


@given(st.lists(WORDS, max_size=4), WORDS)
def test_known_texts_find_what_comparing_with_all_of_them_finds(known, text):
    texts = KnownTexts()
    for one in known:
        texts.add(" ".join(one))
    expected = any(one == text or rouge_l(one, text) > 0.6 for one in known)
    assert texts.has_alike(" ".join(text), 0.6) == expected


def test_words_are_letters_and_digits_whatever_stands_between_them():
    assert words("Über-Maß: 3,5 km!") == ["über", "maß", "3", "5", "km"]


def test_objects_are_found_in_whatever_a_teacher_writes_around_them():
    text = 'Sure!\n```json\n{"a": 1}\n{"a": {"b": 2}}\n```\n1. {"a": "}"} and {broken {"a": 3} [{"a": 4}] {"a": '
    assert list(objects_in(text)) == [{"a": 1}, {"a": {"b": 2}}, {"a": "}"}, {"a": 3}, {"a": 4}]
    assert list(objects_in("{" * 100_000)) == []


@pytest.fixture
def seeds(tmp_path: Path):
    path = tmp_path / "seed.jsonl"
    rows = [{"say": "play a song by Bach", "intent": "PlayMusic"}, {"say": "book a table for two", "intent": "Book"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_seeds(
        TaskConfig(name="rows", train=str(path), columns={"prompt": "Which intent? {say}", "completion": "intent"})
    )


def reply(*rows):
    return "\n".join(json.dumps(row) for row in rows)


def row(say, intent):
    return {"say": say, "intent": intent}


def test_sieve_keeps_new_rows_of_the_seeds_form_and_says_why_others_fall(seeds):
    shape, rows = seeds
    sieve = Sieve(shape, rows, rouge_l=0.8, answers=frozenset({"PlayMusic", "Book"}), votes=0)
    text = reply(
        row("put on the goldberg variations", "PlayMusic") | {"extra": 1},
        row("put on the Goldberg variations!", "PlayMusic"),
        row("play a song by Bach", "Book"),
        row("what is the weather", "GetWeather"),
        row("", "Book"),
        {"say": "no intent"},
        row(["a list"], "Book"),
        row("find me a cheap inn near the sea", "Book"),
        row("reserve seats at the opera tonight", "Book"),
    )
    judged = sieve.take(text, room=2, votes=lambda _: ())
    assert [one.why for one in judged] == [
        "",
        sift.DUPLICATE,
        sift.DUPLICATE,
        sift.UNKNOWN_ANSWER,
        sift.BAD_ROW,
        sift.BAD_ROW,
        sift.BAD_ROW,
        "",
        sift.SURPLUS,
    ]
    assert judged[0].row.values == row("put on the goldberg variations", "PlayMusic")
    assert judged[0].row.prompt == "Which intent? put on the goldberg variations"


def test_sieve_answers_nonsense_with_a_reason_and_keeps_its_state(seeds):
    shape, rows = seeds
    sieve = Sieve(shape, rows, rouge_l=0.8, answers=frozenset(), votes=0)
    for nonsense in ("", "I cannot help with that.", "\x00" * 50, "[1, 2", '{"say": 1, "intent": 2}'):
        assert {one.why for one in sieve.take(nonsense, room=1, votes=lambda _: ())} <= {sift.NO_ROWS, sift.BAD_ROW}
    assert not sieve.take(reply(row("dim the lights", "Lights")), room=1, votes=lambda _: ())[0].why


def test_sieve_keeps_a_row_only_if_most_votes_are_its_answer(seeds):
    shape, rows = seeds
    for votes, why in (
        (["Book", " book ", "Play"], ""),
        (["Play", "Book", "x"], sift.NOT_VERIFIED),
        ([], "to be verified"),
    ):
        sieve = Sieve(shape, rows, rouge_l=0.8, answers=frozenset(), votes=3)
        assert sieve.take(reply(row("a room with a view", "Book")), room=1, votes=lambda _, v=votes: v)[0].why == why
    assert same_answer('{"a": 1, "b": 2}', '{"b":2,"a":1}') and not same_answer("3", "4")


def test_seed_rows_keep_their_columns_and_lines_of_whatever_kind_of_file(tmp_path):
    table = tmp_path / "seed.csv"
    table.write_text("text,label\nfine weather,1\n\nbad weather,0\nleft out,1\n")
    shape, rows = read_seeds(TaskConfig(name="rows", train=str(table), limit=2))
    assert shape.format == "labelled" and shape.keys == ("text", "label")
    assert [(one.line_number, one.question, one.answer) for one in rows] == [
        (2, "fine weather", "1"),
        (4, "bad weather", "0"),
    ]
