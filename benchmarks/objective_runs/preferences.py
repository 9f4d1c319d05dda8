"""Reward models on people's labels, and preference pairs: what is learned must hold on rows that were never seen.

``reward``: turns of Taskmaster's agents that people rated 0 or 1 (github.com/google-research-datasets/Taskmaster, TM-3
movies and TM-4 coffee as in Christian et al. 2024, PERL, arXiv:2403.10704; CC BY 4.0), as ``tm3_movies.jsonl`` and
``tm4_coffee.jsonl`` in the data folder's ``taskmaster_reward``. Nearly all turns of one domain are good, of the other
bad, so that telling the domains apart would already rank them: what counts is the AUC within a domain.
``dpo``: the right intent of an utterance against a wrong one, from SNIPS as it comes with plutino.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from benchmarks.engine_job import EngineJob
from benchmarks.objective_runs.run import Figures, Run, Settings
from plutino.assets import SNIPS_DIR, TINY_LLAMA_DIR
from plutino.job.spec import JobSpec, parse_spec

AUC_GOAL = 0.65
_DOMAINS = ("tm3_movies", "tm4_coffee")
_CONTEXT_CHARS, _ANSWER_CHARS = 320, 140
_HELD_OUT_SHARE = 5
"""One dialogue in so many is held out."""


def spec_of(settings: Settings, **parts: Any) -> JobSpec:
    """A job on the bundled model with the process's seed."""
    training = {"seed": settings.seed, **parts.pop("training", {})}
    values = {"model": {"path": str(TINY_LLAMA_DIR), "dtype": "fp32"}, "training": training, **parts}
    return parse_spec(values, base_dir=settings.folder)


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> str:
    """Write a jsonl file; gives its path."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def mean_text(values: Sequence[float]) -> str:
    """Mean and standard deviation over seeds."""
    spread = stdev(values) if len(values) > 1 else 0.0
    return f"{mean(values):.3f} +- {spread:.3f}"


def shuffled(rows: Sequence[dict[str, Any]], seed: int) -> list[dict[str, Any]]:
    """In an order that depends on the seed alone."""
    return sorted(rows, key=lambda row: hashlib.sha256(f"{seed} {json.dumps(row)}".encode()).digest())


# ---- a reward model on people's ratings ----


def _text_of(turn: Mapping[str, Any]) -> str:
    said = turn["text"] if "text" in turn else json.dumps(turn.get("api", turn.get("response")))
    return f"{turn['role']}: {said}"


def _rated(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """Dialogue and row. Turns whose dialogues begin with the same words of the user count as one dialogue."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        values = json.loads(line)
        opening = next((turn["text"] for turn in values["context"] if turn["role"] == "user"), "")
        context = "\n".join(_text_of(turn) for turn in values["context"])[-_CONTEXT_CHARS:]
        answer = _text_of(values["generation"])[:_ANSWER_CHARS]
        rows.append(
            (
                " ".join(opening.lower().split()),
                {"prompt": f"{context}\n", "completion": answer, "rating": values["reward"]},
            )
        )
    return rows


def _is_held_out(dialogue: str, seed: int) -> bool:
    return hashlib.sha256(f"{seed} {dialogue}".encode()).digest()[0] % _HELD_OUT_SHARE == 0


def run_reward(settings: Settings) -> Figures:
    """Train on the ratings of both domains; AUC within each on dialogues that were held out."""
    assert settings.data is not None, "the run is told where the ratings are"
    train: list[dict[str, Any]] = []
    tasks = []
    for domain in _DOMAINS:
        rows = _rated(settings.data / "taskmaster_reward" / f"{domain}.jsonl")
        seen = shuffled([row for dialogue, row in rows if not _is_held_out(dialogue, settings.seed)], settings.seed)
        held_out = shuffled([row for dialogue, row in rows if _is_held_out(dialogue, settings.seed)], settings.seed)
        # As many good as bad ones: otherwise the domain alone would explain the ratings.
        good, bad = ([row for row in seen if (row["rating"] > 0.5) is is_good] for is_good in (True, False))
        num = min(len(good), len(bad), settings.few(400, 12))
        train += good[:num] + bad[:num]
        path = write_rows(settings.folder / f"{domain}.jsonl", held_out[: settings.few(300, 40)])
        tasks.append({"name": domain, "eval": path, "format": "rated"})
    path = write_rows(settings.folder / "train.jsonl", shuffled(train, settings.seed))
    spec = spec_of(
        settings,
        objective={"type": "reward", "labels": "ratings"},
        method={"type": "lora", "rank": 16, "alpha": 32, "target_modules": "all-linear", "dropout": 0.05},
        data={"tasks": [{"name": "both", "train": path, "format": "rated"}, *tasks], "max_tokens": 384},
        scoring={},
        training={
            **({"steps": 4} if settings.is_quick else {"epochs": 2}),
            "batch_size": 16,
            "lr": 1e-3,
            "warmup_steps": 5,
        },
    )
    with EngineJob(spec, threads=settings.threads) as job:
        before = job.score().by_task
        job.train()
        after = job.score().by_task
        return {
            "train_rows": len(train),
            "held_out_rows": {name: after[name].num_rows for name in _DOMAINS},
            "auc_before": {name: before[name].auc for name in _DOMAINS},
            "auc": {name: after[name].auc for name in _DOMAINS},
            "losses": job.losses[:: max(1, len(job.losses) // 20)],
        }


def judge_reward(seeds: Sequence[Figures]) -> tuple[str, bool]:
    """Mean over domains and seeds."""
    means = [mean(one["auc"].values()) for one in seeds]
    each = ", ".join(f"{name} {mean_text([one['auc'][name] for one in seeds])}" for name in _DOMAINS)
    goal = f"AUC within a domain {mean_text(means)} ({each}), goal {AUC_GOAL}, on dialogues held out"
    return goal, mean(means) >= AUC_GOAL


# ---- preference pairs ----


def snips_rows(name: str) -> list[dict[str, str]]:
    """Utterances with their intents."""
    lines = (SNIPS_DIR / name).read_text(encoding="utf-8").splitlines()
    turns = [[message["content"] for message in json.loads(line)["messages"]] for line in lines]
    return [{"prompt": prompt, "completion": answer} for prompt, answer in turns]


def _pairs(rows: Sequence[Mapping[str, str]], intents: Sequence[str], seed: int) -> list[dict[str, Any]]:
    pairs = []
    for index, row in enumerate(rows):
        wrong = [intent for intent in intents if intent != row["completion"]]
        draw = hashlib.sha256(f"{seed} {index}".encode()).digest()[0]
        pairs.append(
            {
                "prompt": [{"role": "user", "content": row["prompt"]}],
                "chosen": [{"role": "assistant", "content": row["completion"]}],
                "rejected": [{"role": "assistant", "content": wrong[draw % len(wrong)]}],
            }
        )
    return pairs


def run_dpo(settings: Settings) -> Figures:
    """Margin and share of pairs in the right order, held out, before and after."""
    rows, held_out = snips_rows("train.jsonl"), snips_rows("validation.jsonl")
    intents = sorted({row["completion"] for row in rows})
    train = _pairs(shuffled(rows, settings.seed)[: settings.few(960, 24)], intents, settings.seed)
    spec = spec_of(
        settings,
        objective={"type": "dpo", "beta": 0.1},
        method={"type": "lora", "rank": 16, "alpha": 32, "target_modules": "all-linear"},
        data={
            "train": write_rows(settings.folder / "train.jsonl", train),
            "eval": write_rows(
                settings.folder / "eval.jsonl", _pairs(held_out[: settings.few(200, 20)], intents, settings.seed)
            ),
        },
        scoring={},
        training={
            **({"steps": 4} if settings.is_quick else {"epochs": 1}),
            "batch_size": 16,
            "lr": 1e-3,
            "warmup_steps": 5,
        },
    )
    with EngineJob(spec, threads=settings.threads) as job:
        before, after_steps = job.score().score, {}

        def keep(step: int) -> None:
            if step % max(1, job.prepared.total_steps // 4) == 0:
                after_steps[step] = job.score().score.margin

        job.train(keep)
        after = job.score().score
    return {
        "train_pairs": len(train),
        "held_out_pairs": after.num_rows,
        "margin_before": before.margin,
        "margin": after.margin,
        "margin_by_step": after_steps,
        "pair_accuracy_before": before.pair_accuracy,
        "pair_accuracy": after.pair_accuracy,
        "losses": job.losses[:: max(1, len(job.losses) // 20)],
    }


def judge_dpo(seeds: Sequence[Figures]) -> tuple[str, bool]:
    """The margin must rise in every seed."""
    margins, shares = ([one[name] for one in seeds] for name in ("margin", "pair_accuracy"))
    goal = f"margin on held-out pairs from 0 to {mean_text(margins)}, {mean_text(shares)} of them in the right order"
    return goal, all(margin > 0 for margin in margins)


REWARD = Run(run_reward, judge_reward, needs_data=True)
DPO = Run(run_dpo, judge_dpo)
