"""What a step costs when others do it: ``python -m benchmarks.pipeline_peers``.

Contenders, all with two threads of this machine in all: stock transformers + peft in one process (the whole batch at
once, and in micro-batches), and torch.distributed.pipelining over gloo with two processes at several cuts.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path

from benchmarks.contender import ChildCommand, ChildContender, Contender
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
from benchmarks.peers.workload import Workload

THREADS = 2
# Peers round to bf16 in different places: micro-batches sum their gradients in another order than a whole batch.
LOSS_TOLERANCE = 0.02
MAX_QUIET_LOAD = 0.5


def stage_sizes(workload: Workload, cuts: tuple[int, ...]) -> str:
    """Numbers of blocks of the stages, such as ``6|6``."""
    return "|".join(str(end - start) for start, end in pairwise((0, *cuts, workload.num_blocks)))


def one_process(workload: Workload, num_micro_batches: int) -> ChildContender:
    """Stock transformers + peft, the batch cut into this many micro-batches."""
    arguments = ("-m", "benchmarks.peers.one_process", workload.to_json(), str(num_micro_batches))
    name = "one process, whole batch" if num_micro_batches == 1 else f"one process, {num_micro_batches} micro-batches"
    return ChildContender(name, [ChildCommand(arguments, threads=THREADS)])


def torch_pipelining(workload: Workload, cuts: tuple[int, ...], rendezvous_dir: Path) -> ChildContender:
    """Torch's own 1F1B over gloo, cut before these blocks, a thread a stage."""
    cuts_text = ",".join(map(str, cuts))
    rendezvous = str(rendezvous_dir / f"cuts-{cuts_text}")
    commands = [
        ChildCommand(
            ("-m", "benchmarks.peers.torch_pipelining", workload.to_json(), cuts_text, str(rank), rendezvous), threads=1
        )
        for rank in range(len(cuts) + 1)
    ]
    return ChildContender(f"torch pipelining {stage_sizes(workload, cuts)}", commands)


def main(arguments: list[str] | None = None) -> int:
    """Command line; gives the process's exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pipeline_peers", description=__doc__)
    parser.add_argument("--turns", type=int, default=Turns().num_turns, help="measured turns of each contender")
    parser.add_argument("--cuts", type=int, nargs="+", default=[5, 6, 7], help="cuts to try for torch pipelining")
    parser.add_argument("--out", type=Path, default=RESULTS_DIR / "pipeline_peers.json", help="where the figures go")
    options = parser.parse_args(arguments)
    turns, workload = Turns(num_turns=options.turns), Workload()
    machine = machine_facts(("torch", "transformers", "peft"))
    if os.getloadavg()[0] > MAX_QUIET_LOAD:
        print(f"load average {os.getloadavg()[0]:.1f}: other programs are running, expect noise", file=sys.stderr)
    with tempfile.TemporaryDirectory() as rendezvous_dir:
        contenders: list[Contender] = [
            *(one_process(workload, num_micro_batches) for num_micro_batches in (1, workload.num_micro_batches)),
            *(torch_pipelining(workload, (cut,), Path(rendezvous_dir)) for cut in options.cuts),
        ]
        figures = measure_in_turns(contenders, turns)
    print(table(figures, tokens_per_step=workload.tokens_per_step))
    difference = largest_loss_difference(figures)
    print(f"losses of the same step differ by at most {difference:.4f}")
    if difference > LOSS_TOLERANCE:
        print(f"more than {LOSS_TOLERANCE}: they do not train the same thing, nothing written", file=sys.stderr)
        return 1
    write_results(options.out, figures_document(figures, workload=asdict(workload), machine=machine, turns=turns))
    print(f"all figures: {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
