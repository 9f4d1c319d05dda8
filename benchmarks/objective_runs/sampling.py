"""GRPO from a weak start: an adapter that supervised tuning has taught a little learns the rest from rewards alone.

The task is SNIPS' intents, the reward 1 for exactly the right one. Supervised tuning stops as soon as it is right in
half of the held-out utterances; GRPO goes on from there, on utterances that it has not been tuned on.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean

from torch import Tensor

from benchmarks.engine_job import EngineJob
from benchmarks.objective_runs.preferences import mean_text, shuffled, snips_rows, spec_of, write_rows
from benchmarks.objective_runs.run import Figures, Run, Settings
from plutino.job.spec import JobSpec

GAIN_GOAL = 0.10
START_FROM, START_TO = 0.50, 0.60
_STEPS_BETWEEN_LOOKS = 2
# With the head: the bundled model never saw its chat's tokens, so that LoRA alone gives the stop token after an intent
# hardly more than any other unseen one. It is the likeliest, but of a hundred sampled answers not one ends in it.
_METHOD = {"type": "lora", "rank": 16, "alpha": 32, "target_modules": "all-linear", "modules_to_save": ["lm_head"]}
_SCORING = {"metric": "exact_match", "max_new_tokens": 12, "batch_rows": 64}


def run_grpo(settings: Settings) -> Figures:
    """Held-out exact match before and after GRPO; rewards on the way."""
    rows = shuffled(snips_rows("train.jsonl"), settings.seed)
    held_out = snips_rows("validation.jsonl")[: settings.few(200, 24)]
    tuned, sampled = rows[:400], rows[400 : settings.few(2000, 480)]
    data = {"eval": write_rows(settings.folder / "eval.jsonl", held_out), "columns": {}}
    weak_spec = spec_of(
        settings,
        method=_METHOD,
        data={**data, "train": write_rows(settings.folder / "tuned.jsonl", tuned)},
        scoring=_SCORING,
        training={"steps": settings.few(100, 4), "batch_size": 8, "lr": 5e-4, "lr_schedule": "constant"},
    )
    weak, tuning_steps = _weak_start(weak_spec, settings)
    spec = spec_of(
        settings,
        method=_METHOD,
        objective={
            "type": "grpo",
            "answers": 8,
            "max_new_tokens": 12,
            "group_rows": 64,
            # Against the base, which has never seen an intent: more of it would undo the tuning.
            "beta": 0.001,
        },
        data={**data, "train": write_rows(settings.folder / "sampled.jsonl", sampled)},
        scoring=_SCORING,
        training={
            "steps": settings.few(60, 2),
            "batch_size": settings.few(16, 4),
            "micro_batch_size": 32,
            "lr": 5e-4,
            "lr_schedule": "constant",
            "warmup_steps": 2,
        },
    )
    by_step: dict[int, float] = {}
    with EngineJob(spec, threads=settings.threads) as job:
        job.load(weak)
        before = _exact_match(job)

        def look(step: int) -> None:
            if step % 15 == 0:
                by_step[step] = _exact_match(job)

        job.train(look)
        after = _exact_match(job)
    return {
        "tuning_steps": tuning_steps,
        "exact_match_before": before,
        "exact_match": after,
        "exact_match_by_step": by_step,
        "held_out_rows": len(held_out),
        "rewards": job.rewards,
    }


def _exact_match(job: EngineJob) -> float:
    share = job.score().score.exact_match
    assert share is not None, "exact match is what the run scores"
    return share


def _weak_start(spec: JobSpec, settings: Settings) -> tuple[dict[str, Tensor], int]:
    """The first state that is right often enough, and the steps it took."""
    with EngineJob(spec, threads=settings.threads) as job:
        while len(job.losses) < job.prepared.total_steps:
            job.train(num_steps=_STEPS_BETWEEN_LOOKS)
            if _exact_match(job) >= START_FROM:
                break
        return {name: value.clone() for name, value in job.state().items()}, len(job.losses)


def judge_grpo(seeds: Sequence[Figures]) -> tuple[str, bool]:
    """The gain must reach its goal in the mean, from a start that is weak."""
    before, after = ([one[name] for one in seeds] for name in ("exact_match_before", "exact_match"))
    gains = [late - early for early, late in zip(before, after, strict=True)]
    goal = (
        f"held-out exact match from {mean_text(before)} to {mean_text(after)}, gain {mean_text(gains)}, goal "
        f"{GAIN_GOAL} from a start between {START_FROM} and {START_TO}"
    )
    return goal, mean(gains) >= GAIN_GOAL


GRPO = Run(run_grpo, judge_grpo)
