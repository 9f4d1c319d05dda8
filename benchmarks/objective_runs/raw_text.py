"""Raw text of a domain: ``dapt_legal`` and ``dapt_medical``.

Sections of the D.C. Code (github.com/DCCouncil/dc-law-xml, public domain) and answers of MedQuAD
(github.com/abachaa/MedQuAD, CC BY 4.0): ``legal_dc_code/sections.jsonl`` and ``medquad/all.jsonl`` in the data folder.
Held out are whole sections, and whole topics: MedQuAD asks about one disease in many rows.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.engine_job import EngineJob
from benchmarks.objective_runs.preferences import mean_text, shuffled, spec_of, write_rows
from benchmarks.objective_runs.run import Figures, Run, Settings

FALL_GOAL = 0.25
_HELD_OUT_SHARE = 10
"""One section or topic in so many is held out."""
LORA = {"type": "lora", "rank": 32, "alpha": 64, "target_modules": "all-linear"}


def rows_of(path: Path) -> Iterator[dict[str, Any]]:
    """Rows of a jsonl file."""
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)


def is_held_out(group: str, seed: int) -> bool:
    """Whether everything of a section or topic is held out, the same in every process."""
    return hashlib.sha256(f"{seed} {group}".encode()).digest()[0] % _HELD_OUT_SHARE == 0


def _texts(data: Path, domain: str) -> Iterator[tuple[str, str]]:
    """Group and text of each document."""
    if domain == "legal":
        for row in rows_of(data / "legal_dc_code" / "sections.jsonl"):
            yield row["id"], row["text"]
    else:
        for row in rows_of(data / "medquad" / "all.jsonl"):
            yield row["focus"] or row["question"], row["answer"]


def _run_dapt(settings: Settings, domain: str) -> Figures:
    """Perplexity of held-out documents and of general text, before and after."""
    assert settings.data is not None, "the run is told where the texts are"
    documents = [(group, {"text": text}) for group, text in _texts(settings.data, domain) if len(text) > 200]
    seen = shuffled([row for group, row in documents if not is_held_out(group, settings.seed)], settings.seed)
    held_out = shuffled([row for group, row in documents if is_held_out(group, settings.seed)], settings.seed)
    train = seen[: settings.few(2000, 12)]
    spec = spec_of(
        settings,
        objective={"type": "dapt"},
        method=LORA,
        data={
            "train": write_rows(settings.folder / "train.jsonl", train),
            "eval": write_rows(settings.folder / "held-out.jsonl", held_out[: settings.few(80, 3)]),
            "max_tokens": 256,
            "packing": True,
        },
        scoring={},
        evaluation={"measure_general": "always"},
        training={"steps": settings.few(240, 3), "batch_size": 8, "lr": 2e-3, "warmup_steps": settings.few(10, 0)},
    )
    with EngineJob(spec, threads=settings.threads) as job:
        before, general_before = job.score(use_adapter=False).score.perplexity, job.general(use_adapter=False)
        job.train()
        after, general_after = job.score().score.perplexity, job.general()
    assert before is not None and after is not None, "dapt is scored by perplexity"
    return {
        "train_documents": len(train),
        "steps": len(job.losses),
        "held_out_tokens": spec.data.max_tokens,
        "perplexity_before": before,
        "perplexity": after,
        "fall": 1 - after / before,
        "general_loss_before": general_before,
        "general_loss": general_after,
        "losses": job.losses[:: max(1, len(job.losses) // 20)],
    }


def _judge_dapt(seeds: Sequence[Figures]) -> tuple[str, bool]:
    falls = [one["fall"] for one in seeds]
    costs = [one["general_loss"] - one["general_loss_before"] for one in seeds]
    goal = (
        f"held-out perplexity falls by {mean_text(falls)}, goal {FALL_GOAL}; the loss on general text changes by "
        f"{mean_text(costs)} nats a token"
    )
    return goal, min(falls) >= FALL_GOAL


DAPT_LEGAL = Run(lambda settings: _run_dapt(settings, "legal"), _judge_dapt, needs_data=True)
DAPT_MEDICAL = Run(lambda settings: _run_dapt(settings, "medical"), _judge_dapt, needs_data=True)
