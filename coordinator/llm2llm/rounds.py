"""What a round trains on, and its job: pure functions of the loop and of the rounds before."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from coordinator.llm2llm.questions import Seeds
from coordinator.llm2llm.records import RoundOutcome
from plutino.data.batches import sample_order
from plutino.data.formats import RowFormat
from plutino.job.data import RowsConfig, ScoringConfig, TaskConfig
from plutino.job.spec import JobSpec
from plutino.llm2llm import LoopSpec

SEED, HELD_OUT = "seed", "held-out"
"""The tasks of a round's job: the seed is asked after training, held-out rows only measure."""


def num_trainings(spec: LoopSpec) -> int:
    """One more than rounds of asking."""
    return spec.loop.rounds + 1


def ending_reason(outcome: RoundOutcome) -> str:
    """Why no further round would change anything; empty if one may."""
    if not outcome.wrong:
        return "the student has every seed row right"
    if not outcome.kept:
        return "the teacher gave no new row"
    return ""


def round_rows(seeds: Seeds, outcomes: Sequence[RoundOutcome], seed: int) -> list[str]:
    """Rows of a round as JSON, in an order of their own; the seed alone stays as it is."""
    rows = [row.json for row in seeds.rows]
    if not outcomes:
        return rows
    new = [json.dumps(one.row, ensure_ascii=False, sort_keys=True) for outcome in outcomes for one in outcome.kept]
    everything = [*rows, *new]
    return [everything[place] for place in sample_order(len(everything), seed, len(outcomes)).tolist()]


def round_spec(
    spec: LoopSpec, row_format: RowFormat, folder: Path, number: int, *, name: str, is_published: bool
) -> JobSpec:
    """The job of a round: from the base model, asked the seed and the held-out rows when it is trained."""
    job = spec.job
    source = job.data.sources[0]
    columns = dict(source.columns)
    tasks = [
        TaskConfig(
            name=SEED,
            train=str(folder / f"round-{number}.jsonl"),
            eval=str(folder / "seed.jsonl"),
            format=row_format,
            columns=columns,
        )
    ]
    if source.eval is not None:
        tasks.append(
            TaskConfig(
                name=HELD_OUT,
                eval=source.eval,
                eval_limit=source.eval_limit,
                format=source.format,
                columns=columns,
            )
        )
    scoring = job.scoring or ScoringConfig()
    alone = {key: field.get_default(call_default_factory=True) for key, field in RowsConfig.model_fields.items()}
    return job.model_copy(
        update={
            "name": name[:80],
            "data": job.data.model_copy(update={**alone, "tasks": tuple(tasks)}),
            "scoring": scoring.model_copy(
                update={"before": scoring.before and number == 0, "few_shot": 0, "after": True, "keep_answers": True}
            ),
            "evaluation": job.evaluation
            if is_published
            else job.evaluation.model_copy(update={"measure_general": "never"}),
            "output": job.output if is_published else job.output.model_copy(update={"publish": False, "dir": None}),
        }
    )
