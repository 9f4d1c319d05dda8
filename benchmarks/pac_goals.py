"""What the runs of one shape say beside what was to be shown. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from benchmarks.goals import Goal
from benchmarks.pac_contenders import (
    ALONE,
    FP16_SUMS,
    FULL_PIPELINE,
    LEAST,
    LEAVING,
    LORA_SIXTEEN_BITS,
    OURS,
    OWN_DTYPE,
    PAC,
    RAY_TRAIN,
    SIXTEEN_BITS,
    TOP_QUARTER,
    TOP_QUARTER_CACHED,
    TRAINER,
    UNCACHED,
)
from benchmarks.pac_figures import RunFigures
from plutino.sizes import MIB

LEAST_OVER_BEST = {"t5-base": 3.0, "bart-large": 3.0, "t5-large": 6.0}
"""Three epochs against the best baseline on the same fleet; PAC published 2.2, 1.9 and 4.0."""
_EXTRAPOLATED = ", extrapolated to the whole task"
_FULL_ROWS = {"mrpc": 3667, "stsb": 5749}

Runs = Mapping[str, RunFigures]


def best_baseline(seconds: Mapping[str, float], baselines: Sequence[str]) -> str | None:
    """The quickest of those that ran."""
    return min((name for name in baselines if name in seconds), key=lambda name: seconds[name], default=None)


def goals_of(
    runs: Runs,
    *,
    shape: str,
    baselines: Sequence[str],
    codec_bytes: float,
    hidden_size: int,
    task: str,
    batch_size: int,
    num_devices: int,
) -> list[Goal]:
    """Every goal that these runs say something about.

    Args:
        runs: figures by contender.
        shape: name of the model's shape.
        baselines: contenders on the same fleet with methods of others.
        codec_bytes: of a token at one place of the cache.
        hidden_size: of the model.
        task: whose rows are a part of; see :func:`whole_task_s`.
        batch_size: rows of a step.
        num_devices: of the fleet.
    """
    goals: list[Goal] = []

    def ratio(
        name: str,
        above: float | None,
        below: float | None,
        at_least: float | None = None,
        at_most: float | None = None,
    ) -> None:
        if above is not None and below:
            goals.append(Goal(name=name, measured=above / below, at_least=at_least, at_most=at_most))

    ours = runs.get(OURS)
    if ours is not None:
        for words, seconds in (("", _totals(runs)), (_EXTRAPOLATED, _whole(runs, task, batch_size))):
            best = best_baseline(seconds, baselines)
            least = LEAST_OVER_BEST.get(shape, 3.0)
            if best is not None:
                ratio(f"3 epochs, best baseline ({best}) / ours{words}", seconds[best], seconds[OURS], at_least=least)
            ratio(f"3 epochs, PAC as published / ours{words}", seconds.get(PAC), seconds[OURS], at_least=1.5)
            for name in (OWN_DTYPE, FP16_SUMS, SIXTEEN_BITS):
                if best is not None:
                    ratio(f"3 epochs, best baseline ({best}) / {name}{words}", seconds[best], seconds.get(name))
                ratio(f"3 epochs, PAC as published / {name}{words}", seconds.get(PAC), seconds.get(name))
            lora = seconds.get(LORA_SIXTEEN_BITS)
            ratio(f"3 epochs, {LORA_SIXTEEN_BITS} / {SIXTEEN_BITS}{words}", lora, seconds.get(SIXTEEN_BITS))
            alone = seconds.get(ALONE)
            ratio(f"3 epochs, one device with the same method / ours{words}", alone, seconds[OURS], at_least=10.0)
            ratio(f"the same by device{words}", alone, num_devices * seconds[OURS])
            trainer = seconds.get(f"{TRAINER}: lora")
            ratio(f"3 epochs, transformers Trainer + peft on one device / ours{words}", trainer, seconds[OURS])
            ray = seconds.get(f"{RAY_TRAIN}: lora")
            ratio(f"3 epochs, {RAY_TRAIN} + peft on the fleet / ours{words}", ray, seconds[OURS])
        ratio("cached epoch / first epoch", _later_s(ours), ours.first_epoch_s, at_most=0.15)
        if (halved := runs.get(SIXTEEN_BITS)) is not None:
            ratio(f"cached epoch / first epoch, {SIXTEEN_BITS}", _later_s(halved), halved.first_epoch_s)
        ratio("100 Mbit / 1 Gbit", _total(runs, "ours, 100 Mbit"), ours.total_s, at_most=1.2)
    if (uncached := runs.get(UNCACHED)) is not None:
        first = {name: runs[name].first_epoch_s for name in baselines if name in runs}
        if first:
            name = min(first, key=lambda each: first[each])
            ratio(f"one epoch uncached, best baseline ({name}) / ours", first[name], uncached.first_epoch_s, at_least=2)
        if ours is not None:
            beside = ours.first_epoch_s / uncached.first_epoch_s
            goals.append(Goal(name="first epoch with the cache written / without", measured=beside, at_most=1.05))
    ratio(
        "LoRA on the top quarter, uncached / cached",
        _total(runs, TOP_QUARTER),
        _total(runs, TOP_QUARTER_CACHED),
        at_least=1.5,
    )
    full = _peak(runs.get(FULL_PIPELINE))
    ratio("peak job bytes, first epoch / full fine-tuning", _peak(ours), full, at_most=0.25)
    leaving = runs.get(LEAVING)
    ratio("peak job bytes, cached epochs / full fine-tuning", _peak(leaving, cached=True), full, at_most=0.08)
    smallest = runs.get(LEAST)
    ratio(f"peak job bytes, first epoch / full fine-tuning, {LEAST}", _peak(smallest), full, at_most=0.25)
    ratio(
        f"peak job bytes, cached epochs / full fine-tuning, {LEAST}", _peak(smallest, cached=True), full, at_most=0.08
    )
    if leaving is not None and leaving.moves_s:
        ratio("moving at the switch / whole time", leaving.moves_s[0], leaving.total_s, at_most=0.02)
    ratio("cache bytes a token and place / hidden size", codec_bytes, float(hidden_size), at_most=0.5)
    return goals


def scaling_goals(runs: Runs) -> list[Goal]:
    """Of :func:`benchmarks.pac_contenders.scaling_contenders`; first and cached epochs apart."""
    goals: list[Goal] = []
    two, eight = runs.get("2 equal agents"), runs.get("8 equal agents")
    alone = [runs.get(f"alone {threads}") for threads in (4, 2, 1)]
    together = runs.get("agents of 4:2:1")
    for epoch, words in ((0, "first epoch"), (1, "cached epochs")):
        if two is not None and eight is not None:
            share = two.step_s[epoch] / (4 * eight.step_s[epoch])
            goals.append(Goal(name=f"8 equal agents beside 4 x those of 2, {words}", measured=share, at_least=0.92))
        if together is not None and all(alone):
            summed = sum(1 / each.step_s[epoch] for each in alone if each is not None)
            share = 1 / together.step_s[epoch] / summed
            goals.append(Goal(name=f"agents of 4:2:1 beside their sum, {words}", measured=share, at_least=0.85))
    return goals


def whole_task_s(figures: RunFigures, task: str, *, batch_size: int) -> float:
    """Seconds that all the task's rows would have taken: begin, moves and end as measured, steps by their median.

    An extrapolation, to be called one.
    """
    num_steps = -(-_FULL_ROWS[task] // batch_size)
    return figures.total_s - sum(figures.epoch_s) + num_steps * sum(figures.step_s)


def _later_s(figures: RunFigures) -> float | None:
    later_s = figures.later_epochs_s
    return sum(later_s) / len(later_s) if later_s else None


def _totals(runs: Runs) -> dict[str, float]:
    return {name: each.total_s for name, each in runs.items()}


def _whole(runs: Runs, task: str, batch_size: int) -> dict[str, float]:
    return {name: whole_task_s(each, task, batch_size=batch_size) for name, each in runs.items()}


def _total(runs: Runs, name: str) -> float | None:
    return runs[name].total_s if name in runs else None


def _peak(figures: RunFigures | None, *, cached: bool = False) -> float | None:
    found = None if figures is None else (figures.cached_job_bytes if cached else figures.job_bytes)
    return float(max(found.values())) if found else None


def table(runs: Runs, task: str, *, batch_size: int) -> str:
    """Plain text: a line a contender, the quickest first."""
    head = f"{'contender':<38} {'total s':>8} {'begin':>6} {'epoch 1':>8} {'later':>8} {'end':>6} {'whole task':>10}"
    lines = [f"{head} {'peak MiB':>9} {'cached':>7} {'sent MiB':>9}"]
    for name, each in sorted(runs.items(), key=lambda item: item[1].total_s):
        later_s = sum(each.later_epochs_s) / max(1, len(each.later_epochs_s))
        peak, cached = (f"{found / MIB:.0f}" if found else "" for found in (_peak(each), _peak(each, cached=True)))
        sent = max(each.sent_bytes.values()) if each.sent_bytes else 0
        # Its seconds are of links that no other contender of several devices has.
        label = f"{name}, over loopback" if name.startswith(RAY_TRAIN) else name
        lines.append(
            f"{label:<38} {each.total_s:>8.1f} {each.begin_s:>6.1f} {each.first_epoch_s:>8.2f} {later_s:>8.2f} "
            f"{each.end_s:>6.1f} {whole_task_s(each, task, batch_size=batch_size):>10.0f} "
            f"{peak:>9} {cached:>7} {sent / MIB:>9.1f}"
        )
    return "\n".join(lines)
