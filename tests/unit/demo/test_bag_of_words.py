from __future__ import annotations

from collections import Counter

from coordinator.demo.bag_of_words import bag_of_words
from plutino.assets import SNIPS_DIR
from plutino.data.readers import Message, Row, read_rows


def row(text: str, answer: str) -> Row:
    return Row(1, (Message("user", text), Message("assistant", answer, carries_loss=True)))


TRAIN = [row("play some jazz", "music"), row("play a song", "music"), row("will it rain", "weather")]


def test_bag_of_words_separable_rows_are_learned() -> None:
    result = bag_of_words(TRAIN, [row("a jazz song", "music"), row("rain it will", "weather")])

    assert result.accuracy == 1
    assert (result.num_words, result.num_classes) == (8, 2)


def test_bag_of_words_chance_is_the_commonest_training_answers_share() -> None:
    result = bag_of_words(TRAIN, [row("rain", "weather"), row("jazz", "music"), row("x", "music"), row("y", "new")])

    assert result.chance_accuracy == 0.5


def test_bag_of_words_answer_never_trained_on_is_wrong() -> None:
    assert bag_of_words(TRAIN, [row("play", "unheard of")]).accuracy == 0


def test_shipped_rows_are_balanced_and_held_out_ones_are_unseen() -> None:
    train, held_out = (read_rows(SNIPS_DIR / f"{name}.jsonl").rows for name in ("train", "validation"))

    counts = Counter(row.answer for row in train)
    seen = {row.messages[0].content.lower() for row in train}
    assert (len(train), len(held_out), len(counts)) == (2000, 200, 7)
    assert max(counts.values()) - min(counts.values()) <= 1
    assert not [row for row in held_out if row.messages[0].content.lower() in seen]
