"""Made the data files of these examples from public data sets: ``python -m examples.make_data DATA``.

DATA holds the data sets as jsonl: ``legal_dc_code/sections.jsonl`` (github.com/DCCouncil/dc-law-xml, public domain),
``taskmaster_reward/tm4_coffee.jsonl`` (github.com/google-research-datasets/Taskmaster, CC BY 4.0),
``banking77/{train,test}.jsonl`` (github.com/PolyAI-LDN/task-specific-datasets, CC BY 4.0) and
``snips/{train,validation}.jsonl`` (github.com/snipsco/nlu-benchmark, CC0).
"""

from __future__ import annotations

import asyncio
import csv
import hashlib
import json
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.objective_runs.loops import Recombiner
from coordinator.llm2llm.teachers.base import Ask, Reply

HERE = Path(__file__).resolve().parent


def main() -> None:
    """Write all files."""
    data = Path(sys.argv[1])
    snips, snips_held_out = (_shuffled(_read(data / "snips" / f"{name}.jsonl")) for name in ("train", "validation"))
    _dapt(data)
    _reward(data)
    _banking(data / "banking77")
    for split, rows in (("train", snips[:700]), ("eval", snips_held_out[:140])):
        _table(HERE / "classification" / f"{split}.csv", ((row["text"], row["intent"]) for row in rows))
        _table(HERE / "regression" / f"{split}.csv", ((row["text"], len(row["slots"])) for row in rows))
        _write(HERE / "dpo" / f"{split}.jsonl", _pairs(rows))
    _llm2llm(snips, snips_held_out)


def _banking(data: Path) -> None:
    rows = {split: _read(data / f"{split}.jsonl") for split in ("train", "test")}
    counts = Counter(row["intent"] for row in rows["train"])
    intents = sorted(counts, key=lambda intent: (-counts[intent], intent))[:20]
    for split, name, limit in (("train", "train", 2400), ("test", "eval", 100)):
        kept = [row for row in rows[split] if row["intent"] in intents and len(row["text"]) <= 160]
        _write(HERE / "multitask" / f"banking77-{name}.jsonl", _shuffled(kept)[:limit])


def _dapt(data: Path) -> None:
    sections = [row for row in _read(data / "legal_dc_code" / "sections.jsonl") if 400 < len(row["text"]) < 3000]
    rows = [{"text": row["text"]} for row in _shuffled(sections)]
    _write(HERE / "dapt" / "train.jsonl", rows[:300])
    _write(HERE / "dapt" / "eval.jsonl", rows[300:330])


def _reward(data: Path) -> None:
    """Good and bad turns in equal numbers; a dialogue is in one of the two files."""
    rows: dict[str, dict[bool, list[dict[str, Any]]]] = {"train": {}, "eval": {}}
    for row in _shuffled(_read(data / "taskmaster_reward" / "tm4_coffee.jsonl")):
        opening = next((turn["text"] for turn in row["context"] if turn["role"] == "user"), "")
        split = "eval" if hashlib.sha256(opening.lower().encode()).digest()[0] % 5 == 0 else "train"
        prompt = "\n".join(_said(turn) for turn in row["context"])[-400:] + "\n"
        made = {"prompt": prompt, "completion": _said(row["generation"])[:160], "rating": row["reward"]}
        rows[split].setdefault(row["reward"] > 0.5, []).append(made)
    for split, num in (("train", 250), ("eval", 60)):
        _write(HERE / "reward" / f"{split}.jsonl", _shuffled(rows[split][True][:num] + rows[split][False][:num]))


def _said(turn: Mapping[str, Any]) -> str:
    return f"{turn['role']}: {turn['text'] if 'text' in turn else json.dumps(turn.get('api', turn.get('response')))}"


def _pairs(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """The right intent against a wrong one."""
    intents = sorted({row["intent"] for row in rows})
    made = []
    for row in rows:
        others = [intent for intent in intents if intent != row["intent"]]
        wrong = others[hashlib.sha256(row["text"].encode()).digest()[0] % len(others)]
        made.append({"prompt": row["text"], "chosen": row["intent"], "rejected": wrong})
    return made


def _llm2llm(snips: Sequence[dict[str, Any]], held_out: Sequence[dict[str, Any]]) -> None:
    """Seed rows, and answers that a program made of them, no language model (benchmarks/objective_runs/loops.py)."""
    by_intent: dict[str, list[dict[str, Any]]] = {}
    for row in snips:
        by_intent.setdefault(row["intent"], []).append(row)
    seed = [row for own in zip(*(rows[:8] for rows in by_intent.values()), strict=True) for row in own]
    columns = ("text", "intent")
    rows: list[dict[str, Any]] = []

    async def take(ask: Ask, reply: Reply) -> None:
        made = "\n".join(
            json.dumps({key: json.loads(line)[key] for key in columns}) for line in str(reply.text).split("\n")
        )
        row = json.loads(ask.seed_json)
        rows.append({"row": {key: row[key] for key in columns}, "reply": made})

    asks = [Ask(f"{number}/{at}", (), json.dumps(row), number) for at, row in enumerate(seed) for number in range(4)]
    asyncio.run(Recombiner(seed, 0).answer(asks, take))
    _write(HERE / "llm2llm" / "answers.jsonl", rows)
    _write(HERE / "llm2llm" / "seed.jsonl", [{key: row[key] for key in columns} for row in seed])
    _write(HERE / "llm2llm" / "eval.jsonl", [{key: row[key] for key in columns} for row in held_out[:140]])


def _read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _shuffled(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(rows, key=lambda row: hashlib.sha256(json.dumps(row, sort_keys=True).encode()).digest())


def _write(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def _table(path: Path, rows: Iterable[tuple[str, object]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(("text", "label"))
        table.writerows(rows)


if __name__ == "__main__":
    main()
