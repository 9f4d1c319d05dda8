from __future__ import annotations

import json

import pytest

from benchmarks.contender import ChildCommand, ChildContender, ContenderError, StepFigures
from benchmarks.measure import (
    Figures,
    Turns,
    figures_document,
    largest_loss_difference,
    measure_in_turns,
    table,
    write_results,
)


class FakeContender:
    """Takes the seconds it is told to take, and notes when it was asked."""

    def __init__(self, name, seconds, journal, fails_at_step=None):
        self.name = name
        self._seconds = seconds
        self._journal = journal
        self._fails_at_step = fails_at_step
        self._step = 0

    def start(self):
        self._journal.append((self.name, "start"))
        return {"threads": 1}

    def run_steps(self, num_steps):
        self._journal.append((self.name, num_steps))
        figures = []
        for _ in range(num_steps):
            if self._step == self._fails_at_step:
                raise ContenderError("died")
            figures.append(StepFigures(self._step, self._seconds(self._step), loss=1.0))
            self._step += 1
        return figures

    def close(self):
        self._journal.append((self.name, "close"))


def figures(name, losses, seconds=1.0):
    return Figures(name=name, turns=tuple((StepFigures(i, seconds, x),) for i, x in enumerate(losses)), facts={})


def test_measure_in_turns_two_contenders_reverses_the_order_every_turn():
    journal = []
    contenders = [FakeContender(name, lambda step: 1.0, journal) for name in "ab"]

    measure_in_turns(contenders, Turns(num_turns=7, steps_per_turn=2, warmup_steps=3), report=lambda line: None)

    measured = [name for name, what in journal if what == 2]
    assert "".join(measured) == "ab" + "ba" + "ab" + "ba" + "ab" + "ba" + "ab"


def test_measure_in_turns_slow_warm_up_leaves_the_median_alone():
    contender = FakeContender("a", lambda step: 100.0 if step < 3 else 2.0, [])

    (measured,) = measure_in_turns([contender], Turns(warmup_steps=3), report=lambda line: None)

    assert measured.median_step_s == 2.0
    assert min(measured.losses) == 3


def test_measure_in_turns_contender_dies_ends_all():
    journal = []
    contenders = [FakeContender("a", lambda step: 1.0, journal), FakeContender("b", lambda step: 1.0, journal, 4)]

    with pytest.raises(ContenderError):
        measure_in_turns(contenders, Turns(), report=lambda line: None)

    assert journal[-2:] == [("a", "close"), ("b", "close")]


def test_figures_drifting_machine_shows_in_a_a_ratio():
    contender = FakeContender("a", lambda step: 1.2 if step % 2 else 1.0, [])

    (measured,) = measure_in_turns(
        [contender], Turns(num_turns=8, steps_per_turn=1, warmup_steps=2), report=lambda line: None
    )

    assert measured.a_a_ratio == pytest.approx(1.0 / 1.2)


def test_turns_too_few_for_a_median_refused():
    with pytest.raises(ValueError, match="at least 7 turns"):
        Turns(num_turns=6)


def test_largest_loss_difference_compares_equal_steps():
    assert largest_loss_difference([figures("a", [5.0, 4.0]), figures("b", [5.0, 4.5])]) == 0.5


def test_largest_loss_difference_contender_skipped_steps_compares_common_ones():
    late = Figures(name="late", turns=((StepFigures(1, 1.0, 4.25),),), facts={})

    assert largest_loss_difference([figures("a", [5.0, 4.0]), late]) == 0.25


def test_largest_loss_difference_no_common_step_refused():
    late = Figures(name="late", turns=((StepFigures(7, 1.0, 4.0),),), facts={})

    with pytest.raises(ContenderError, match="cannot be compared"):
        largest_loss_difference([figures("a", [5.0, 4.0]), late])


def test_table_ratio_is_to_the_fastest():
    text = table([figures("slow", [1.0, 1.0], seconds=3.0), figures("fast", [1.0, 1.0])], tokens_per_step=10)

    fast, slow = text.splitlines()[1:]
    assert fast.split() == ["fast", "1.000", "10", "1.00", "1.00"]
    assert slow.split() == ["slow", "3.000", "3", "3.00", "1.00"]


def test_write_results_keeps_every_step(tmp_path):
    path = tmp_path / "results" / "peers.json"

    measured = [figures("a", [5.0, 4.0])]
    write_results(path, figures_document(measured, workload={"seed": 0}, machine={"cpu": "x"}, turns=Turns()))

    kept = json.loads(path.read_text())["contenders"]["a"]
    assert [step["loss"] for turn in kept["turns"] for step in turn] == [5.0, 4.0]
    assert kept["median_step_s"] == 1.0


SERVE = "from benchmarks.contender import serve_steps; serve_steps(lambda step: {loss}, {{'threads': 1}})"


def test_child_contender_two_processes_takes_steps_together():
    commands = [ChildCommand(("-c", SERVE.format(loss=loss)), threads=1) for loss in ("None", "step / 2")]
    contender = ChildContender("pair", commands)
    try:
        facts = contender.start()
        steps = [*contender.run_steps(2), *contender.run_steps(1)]
    finally:
        contender.close()

    assert facts == {"threads": 1}
    assert [(figures.step, figures.loss) for figures in steps] == [(0, 0.0), (1, 0.5), (2, 1.0)]


def test_child_contender_child_dies_error_carries_its_last_words():
    contender = ChildContender("broken", [ChildCommand(("-c", "raise SystemExit('no such model')"), threads=1)])
    try:
        with pytest.raises(ContenderError, match="no such model"):
            contender.start()
    finally:
        contender.close()
