"""Held-out prompts with examples of the training rows before them, for the base model without training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from plutino.data.batches import sample_order
from plutino.data.readers import Message, Row, Rows


def with_examples(held_out: Rows, train: Rows, *, num_examples: int, seed: int, is_chat: bool) -> Rows:
    """The held-out rows, each after the same examples: whole training rows, drawn by the seed.

    Args:
        held_out: the rows to answer.
        train: where examples come from.
        num_examples: how many; fewer if there are no more rows.
        seed: the job's.
        is_chat: the model has a chat template: examples are earlier turns. Else prompts and completions stand one after
            the other, each on lines of its own.
    """
    chosen = [train.rows[position] for position in sample_order(len(train), seed, 0)[:num_examples].tolist()]
    return replace(held_out, rows=tuple(_after(chosen, row, is_chat=is_chat) for row in held_out.rows))


def _after(examples: Sequence[Row], row: Row, *, is_chat: bool) -> Row:
    if is_chat:
        # A system message of the row stays the first one; those of the examples are left out.
        own = [message for message in row.messages if message.role == "system"][:1]
        turns = [message for example in examples for message in example.messages if message.role != "system"]
        rest = row.messages[len(own) :] if row.messages[: len(own)] == tuple(own) else row.messages
        return replace(row, messages=(*own, *turns, *rest))
    text = "".join(f"{example.messages[0].content}{example.answer}\n\n" for example in examples)
    prompt, *answers = row.messages
    return replace(row, messages=(Message(prompt.role, text + prompt.content), *answers))
