"""Make the demo's data from the SNIPS benchmark: ``python examples/snips/make_data.py SOURCE_DIR TARGET_DIR``.

SOURCE_DIR holds train.jsonl and validation.jsonl with rows ``{"text", "intent", "slots": [{"text", "slot"}, ...]}``.
TARGET_DIR gets, for the intent task (answer: the intent) and for the JSON task (answer: intent and slots), 2,000
training rows and 200 held-out rows with nearly equal numbers of every intent. The choice depends on the texts only.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

NUM_TRAIN_ROWS = 2000
NUM_HELD_OUT_ROWS = 200


def main() -> None:
    """Read the source, choose, write four files."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("source_dir", type=Path)
    parser.add_argument("target_dir", type=Path)
    arguments = parser.parse_args()
    held_out = choose(read(arguments.source_dir / "validation.jsonl"), NUM_HELD_OUT_ROWS)
    # A few utterances occur in both splits of the source; a held-out row must be unseen.
    seen = {normalise(row["text"]) for row in held_out}
    unseen = [row for row in read(arguments.source_dir / "train.jsonl") if normalise(row["text"]) not in seen]
    train = choose(unseen, NUM_TRAIN_ROWS)
    arguments.target_dir.mkdir(parents=True, exist_ok=True)
    for name, rows in (("train", train), ("validation", held_out)):
        write(arguments.target_dir / f"{name}.jsonl", (as_messages(row, row["intent"]) for row in rows))
        write(arguments.target_dir / f"{name}_json.jsonl", (as_messages(row, as_json(row)) for row in rows))


def read(path: Path) -> list[dict[str, Any]]:
    """Rows of a jsonl file, each text once."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return list({normalise(row["text"]): row for row in reversed(rows)}.values())[::-1]


def normalise(text: str) -> str:
    """The text without differences that do not make it another utterance."""
    return " ".join(text.lower().split())


def choose(rows: list[dict[str, Any]], num_rows: int) -> list[dict[str, Any]]:
    """So many rows, intents as equal in number as can be, in an order that looks random and never changes."""
    rows = sorted(rows, key=lambda row: hashlib.sha256(row["text"].encode()).digest())
    by_intent: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        by_intent.setdefault(row["intent"], []).append(row)
    quota, num_left = divmod(num_rows, len(by_intent))
    chosen = set()
    for position, intent in enumerate(sorted(by_intent)):
        chosen |= {row["text"] for row in by_intent[intent][: quota + (position < num_left)]}
    return [row for row in rows if row["text"] in chosen]


def as_json(row: dict[str, Any]) -> str:
    """Intent and slots as compact JSON: a slot's text, or a list of its texts where it occurs more than once."""
    slots: dict[str, Any] = {}
    for slot in row["slots"]:
        slots.setdefault(slot["slot"], []).append(slot["text"].strip())
    slots = {name: texts[0] if len(texts) == 1 else texts for name, texts in slots.items()}
    return json.dumps({"intent": row["intent"], "slots": slots}, ensure_ascii=False, separators=(",", ":"))


def as_messages(row: dict[str, Any], answer: str) -> dict[str, Any]:
    """A row in OpenAI's shape."""
    return {"messages": [{"role": "user", "content": row["text"]}, {"role": "assistant", "content": answer}]}


def write(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write a jsonl file."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    main()
