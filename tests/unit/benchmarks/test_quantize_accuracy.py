"""What the accuracy benchmark makes of its figures; trials themselves are too long for a test."""

from __future__ import annotations

from benchmarks.quantize_accuracy import accuracy_goals, table

MODEL = "tiny"


def trials_of(**exact: list[float]) -> dict[str, dict[str, object]]:
    return {
        f"{scheme} {seed}": {
            "model_dir": MODEL,
            "scheme": scheme,
            "score": value,
            "train_cpu_s": 2.0 if scheme == "nf4" else 1.0,
            "score_cpu_s": 1.0,
            "frozen_bytes": 1 << 20,
        }
        for scheme, values in exact.items()
        for seed, value in enumerate(values)
    }


def test_goal_is_on_the_mean_over_seeds() -> None:
    (goal,) = accuracy_goals(trials_of(none=[0.96, 0.94], nf4=[0.91, 0.96]), [MODEL])
    assert round(goal.measured, 6) == 1.5
    assert goal.is_met


def test_goal_is_missed_where_more_is_lost() -> None:
    (goal,) = accuracy_goals(trials_of(none=[0.96], int8=[0.93]), [MODEL])
    assert not goal.is_met


def test_refused_trial_is_no_trial() -> None:
    trials = trials_of(none=[0.96], nf4=[0.95])
    trials["int4 0"] = {"model_dir": MODEL, "scheme": "int4", "refused": "groups do not divide"}
    lines = table(trials, [MODEL]).splitlines()
    assert [line.split()[1] for line in lines[1:]] == ["none", "nf4"]
    assert "2.00x" in lines[2]
