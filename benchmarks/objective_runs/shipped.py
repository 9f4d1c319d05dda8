"""The jobs of ``examples/``, as shipped but for the seed: ``example_KIND``. They are to beat the base model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from benchmarks.engine_job import EngineJob
from benchmarks.objective_runs.preferences import mean_text
from benchmarks.objective_runs.run import Figures, Run, Settings
from coordinator.jobs.scoring import ScoreReport
from plutino.job.spec import load_spec

EXAMPLES_DIR = Path(__file__).resolve().parent.parent.parent / "examples"
KINDS = ("dapt", "multitask", "classification", "regression", "reward", "dpo", "llm2llm")
"""Of ``llm2llm`` the student alone, on its seed rows."""
_LOWER_IS_BETTER = ("perplexity", "mse")


def _run(kind: str, settings: Settings) -> Figures:
    overrides = [f"training.seed={settings.seed}"]
    if settings.is_quick:
        overrides += ["training.epochs=null", "training.steps=2"]
    spec = load_spec(EXAMPLES_DIR / kind / "job.yaml", overrides)
    with EngineJob(spec, threads=settings.threads) as job:
        has_general = job.prepared.num_general > 0
        before = _figures(job.score(use_adapter=False))
        general_before = job.general(use_adapter=False) if has_general else None
        job.train()
        return {
            "steps": len(job.losses),
            "train_rows": job.prepared.num_train,
            "before": before,
            "after": _figures(job.score()),
            **({"general_loss_before": general_before, "general_loss": job.general()} if has_general else {}),
            "losses": job.losses[:: max(1, len(job.losses) // 10)],
        }


def _figures(report: ScoreReport) -> Mapping[str, float]:
    return {"num_rows": float(report.num_rows), **report.values}


def _judge(seeds: Sequence[Figures]) -> tuple[str, bool]:
    """Every task's first figure."""
    names = [name for name in seeds[0]["after"] if name != "num_rows"]
    # A task's first figure is the one that its metric is named for, but for ratings.
    firsts: dict[str, str] = {}
    for name in sorted(names, key=lambda name: not name.endswith("auc")):
        firsts.setdefault(name.rpartition(" ")[0], name)
    is_better, said = True, []
    for name in firsts.values():
        before, after = ([one[moment][name] for one in seeds] for moment in ("before", "after"))
        is_lower = name.rpartition(" ")[2] in _LOWER_IS_BETTER
        is_better = is_better and (sum(after) < sum(before)) is is_lower and sum(after) != sum(before)
        said.append(f"{name} from {mean_text(before)} to {mean_text(after)}")
    return f"{', '.join(said)}, held out", is_better


SHIPPED = {f"example_{kind}": Run(partial(_run, kind), _judge) for kind in KINDS}
