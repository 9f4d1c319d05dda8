"""What mutual TLS costs a job: the same one with it and in plain, in turns: ``python -m benchmarks.tls``.

Two coordinators with two agents each, of which one pair rests while the other trains, as in benchmarks.pipeline. Beside
the time of a step stands the processor's, which other programs on the machine disturb far less.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

from benchmarks.contender import StepFigures
from benchmarks.goals import Goal, goal_table
from benchmarks.measure import (
    RESULTS_DIR,
    Turns,
    figures_document,
    largest_loss_difference,
    machine_facts,
    measure_in_turns,
    table,
    write_results,
)
from benchmarks.model_folder import job_values, write_with_adapter
from benchmarks.peers.workload import Workload
from benchmarks.pipeline import AGENT_BUDGET_BYTES, NO_SHADOWS, NUM_STAGES, QUICK_WORKLOAD
from benchmarks.pipeline_peers import MAX_QUIET_LOAD
from benchmarks.plutino_contender import PlutinoContender
from benchmarks.stack import PlutinoStack
from plutino.job.spec import JobSpec, parse_spec

LEAST_RATIO_TO_PLAIN = 0.95
"""Tokens/s with TLS over those without."""


class CountingContender(PlutinoContender):
    """Also counts the processor seconds of a step, of all its stack's processes."""

    def __init__(self, name: str, stack: PlutinoStack, spec: JobSpec) -> None:
        super().__init__(name, stack, spec)
        self.processor_s: list[float] = []
        """Of a step, by turn; the first turn warms up."""
        self._counted = stack

    def run_steps(self, num_steps: int) -> Sequence[StepFigures]:
        """See :meth:`PlutinoContender.run_steps`."""
        before_s = self._counted.cpu_s()
        steps = super().run_steps(num_steps)
        # Workers rest only when they have computed the step that the next turn begins with.
        self.processor_s.append((self._counted.cpu_s() - before_s) / (num_steps + 1))
        return steps


def main(arguments: list[str] | None = None) -> int:
    """Command line; gives the process's exit status."""
    options = _parser().parse_args(arguments)
    turns = Turns(num_turns=options.turns, steps_per_turn=options.steps_per_turn)
    workload = QUICK_WORKLOAD if options.quick else Workload()
    machine = machine_facts(("torch", "transformers", "peft", "grpcio"))
    if os.getloadavg()[0] > MAX_QUIET_LOAD:
        print(f"load average {os.getloadavg()[0]:.1f}: other programs are running, expect noise", file=sys.stderr)
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="plutino-benchmark-")))
        num_steps = turns.warmup_steps + turns.num_turns * (turns.steps_per_turn + 1) + 4
        folder = write_with_adapter(workload, scratch, num_steps=num_steps)
        values = job_values(workload, folder, dtype="bf16", shadow_every=NO_SHADOWS, num_stages=NUM_STAGES)
        contenders: list[CountingContender] = []
        for name, is_plaintext in (("plain", True), ("mutual TLS", False)):
            state_dir = scratch / name.replace(" ", "-")
            state_dir.mkdir()
            plutino = stack.enter_context(PlutinoStack(state_dir, is_plaintext=is_plaintext))
            plutino.start_agents({f"device-{index}": AGENT_BUDGET_BYTES for index in range(NUM_STAGES)})
            contenders.append(CountingContender(name, plutino, parse_spec(values, base_dir=scratch)))
        figures = measure_in_turns(contenders, turns)
    plain, tls = figures
    print(table(figures, tokens_per_step=workload.tokens_per_step))
    goal = Goal(
        name="mutual TLS / plain", measured=plain.median_step_s / tls.median_step_s, at_least=LEAST_RATIO_TO_PLAIN
    )
    print(goal_table([goal]))
    processor_s = {each.name: each.processor_s[1:] for each in contenders}
    plain_s, tls_s = (statistics.median(values) for values in processor_s.values())
    print(f"processor seconds of a step: {plain_s:.2f} in plain, {tls_s:.2f} with mutual TLS, {tls_s / plain_s:.3f} x")
    difference = largest_loss_difference(figures)
    print(f"losses of the same step differ by at most {difference}")
    out = options.out or RESULTS_DIR / ("tls_quick.json" if options.quick else "tls.json")
    document = figures_document(figures, workload=asdict(workload), machine=machine, turns=turns)
    write_results(out, {"goals": [goal.to_dict()], "processor_s": processor_s, **document})
    print(f"all figures: {out}")
    return 0 if difference == 0 else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tls", description=__doc__)
    parser.add_argument("--turns", type=int, default=Turns().num_turns, help="measured turns of each contender")
    parser.add_argument("--steps-per-turn", type=int, default=Turns().steps_per_turn, help="steps of one turn")
    parser.add_argument("--quick", action="store_true", help="a tiny model: see it run, quote nothing")
    parser.add_argument("--out", type=Path, default=None, help="where the figures go; by default benchmarks/results")
    return parser


if __name__ == "__main__":
    sys.exit(main())
