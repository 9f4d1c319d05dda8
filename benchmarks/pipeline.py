"""plutino's pipeline against its peers, in turns: ``python -m benchmarks.pipeline``.

All train the same model on the same tokens from the same initial adapters, with two threads in all: stock transformers
+ peft in one process, torch.distributed.pipelining over gloo with the cut of plutino's plan, and plutino with its
coordinator and two agents. Coordinator and agents run on the same processors, as they do at a user's.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from benchmarks.contender import Contender
from benchmarks.goals import Goal, goal_table
from benchmarks.measure import (
    RESULTS_DIR,
    Figures,
    Turns,
    figures_document,
    largest_loss_difference,
    machine_facts,
    measure_in_turns,
    median_sync_s,
    table,
    write_results,
)
from benchmarks.model_folder import job_values, write_with_adapter
from benchmarks.peers.workload import Workload
from benchmarks.pipeline_peers import LOSS_TOLERANCE, MAX_QUIET_LOAD, one_process, stage_sizes, torch_pipelining
from benchmarks.plutino_contender import PARTS, PlutinoContender
from benchmarks.stack import PlutinoStack
from plutino.job.spec import parse_spec
from plutino.sizes import GIB

LEAST_RATIO_TO_TORCH_PIPELINING = 1.0
LEAST_RATIO_TO_ONE_PROCESS = 1.1
NUM_STAGES = 2
AGENT_BUDGET_BYTES = 4 * GIB
"""Room to spare: the workers may keep their heaps."""
NO_SHADOWS = 1_000_000
"""The peers store nothing while they train, so plutino does not either."""
QUICK_WORKLOAD = Workload(
    num_blocks=4, hidden_dim=64, intermediate_dim=128, num_heads=4, vocab_size=512, seq_len_tokens=32
)


def main(arguments: list[str] | None = None) -> int:
    """Command line; gives the process's exit status."""
    options = _parser().parse_args(arguments)
    if options.steps_per_turn < 2:
        raise SystemExit("--steps-per-turn must be at least 2: a commit's seconds are known one step later")
    turns = Turns(num_turns=options.turns, steps_per_turn=options.steps_per_turn)
    workload = QUICK_WORKLOAD if options.quick else Workload()
    out = options.out or RESULTS_DIR / ("pipeline_quick.json" if options.quick else "pipeline.json")
    machine = machine_facts(("torch", "transformers", "peft", "grpcio"))
    if os.getloadavg()[0] > MAX_QUIET_LOAD:
        print(f"load average {os.getloadavg()[0]:.1f}: other programs are running, expect noise", file=sys.stderr)
    with tempfile.TemporaryDirectory(prefix="plutino-benchmark-") as scratch:
        figures, per_step_seconds, sync_s = _measure(
            workload, turns, Path(scratch), with_micro_batches=options.micro_batches
        )
    difference = largest_loss_difference(list(figures.values()))
    document = pipeline_document(figures, per_step_seconds, tokens_per_step=workload.tokens_per_step)
    print(table(list(figures.values()), tokens_per_step=workload.tokens_per_step))
    print(_parts_table(per_step_seconds))
    # The last to vote waits for nobody: what it waits is the decision, its transaction and the way there and back.
    beyond_sync_s = min(stage["commit"] for stage in per_step_seconds) - sync_s
    print(
        f"from the last vote to the commit: {1e3 * beyond_sync_s:.1f} ms beyond the transaction's {1e3 * sync_s:.1f} ms"
    )
    goals = pipeline_goals(document)
    print(goal_table(goals))
    print(f"losses of the same step differ by at most {difference:.4f}")
    if difference > LOSS_TOLERANCE:
        print(f"more than {LOSS_TOLERANCE}: they do not train the same thing, nothing written", file=sys.stderr)
        return 1
    details = figures_document(list(figures.values()), workload=asdict(workload), machine=machine, turns=turns)
    commit = {"sync_s": sync_s, "last_vote_to_commit_beyond_sync_s": beyond_sync_s}
    write_results(out, {**document, "commit": commit, "goals": [goal.to_dict() for goal in goals], **details})
    print(f"all figures: {out}")
    return 0


def pipeline_document(
    figures: Mapping[str, Figures], per_step_seconds: Sequence[Mapping[str, float]], *, tokens_per_step: int
) -> dict[str, object]:
    """The figures that others quote.

    Args:
        figures: by contender; keys that begin with ``one_process`` count as one contender, the fastest of them.
        per_step_seconds: plutino's, by stage.
        tokens_per_step: of one batch.
    """
    fastest_s = {
        kind: min(each.median_step_s for key, each in figures.items() if key.startswith(kind))
        for kind in ("one_process", "torch_pipelining", "plutino")
    }
    return {
        "tokens_per_s": {kind: tokens_per_step / step_s for kind, step_s in fastest_s.items()},
        "ratio_to_torch_pipelining": fastest_s["torch_pipelining"] / fastest_s["plutino"],
        "ratio_to_one_process": fastest_s["one_process"] / fastest_s["plutino"],
        "a_a_noise": max(abs(each.a_a_ratio - 1) for each in figures.values()),
        "per_step_seconds": {part: [stage[part] for stage in per_step_seconds] for part in PARTS},
    }


def pipeline_goals(document: Mapping[str, object]) -> list[Goal]:
    """How fast plutino has to be beside its peers."""
    to_torch, to_one = document["ratio_to_torch_pipelining"], document["ratio_to_one_process"]
    assert isinstance(to_torch, float) and isinstance(to_one, float)
    return [
        Goal(name="plutino / torch pipelining", measured=to_torch, at_least=LEAST_RATIO_TO_TORCH_PIPELINING),
        Goal(name="plutino / one process", measured=to_one, at_least=LEAST_RATIO_TO_ONE_PROCESS),
    ]


def _measure(
    workload: Workload, turns: Turns, scratch: Path, *, with_micro_batches: bool
) -> tuple[dict[str, Figures], list[dict[str, float]], float]:
    """Figures by contender, plutino's seconds by stage, and those of one transaction on the coordinator's disk."""
    folder = write_with_adapter(workload, scratch, num_steps=_num_steps(turns))
    values = job_values(workload, folder, dtype="bf16", shadow_every=NO_SHADOWS, num_stages=NUM_STAGES)
    spec = parse_spec(values, base_dir=scratch)
    state_dir = scratch / "state"
    state_dir.mkdir()
    with PlutinoStack(state_dir) as stack:
        stack.start_agents({f"device-{index}": AGENT_BUDGET_BYTES for index in range(NUM_STAGES)})
        cuts = tuple(stage.start_block for stage in stack.plan(spec).stages[1:])
        plutino = PlutinoContender(f"plutino {stage_sizes(workload, cuts)}", stack, spec)
        contenders: dict[str, Contender] = {"one_process": one_process(workload, 1)}
        if with_micro_batches:
            contenders["one_process_micro_batches"] = one_process(workload, workload.num_micro_batches)
        contenders["torch_pipelining"] = torch_pipelining(workload, cuts, scratch)
        contenders["plutino"] = plutino
        figures = measure_in_turns(list(contenders.values()), turns)
        sync_s = median_sync_s(state_dir / "sync.sqlite")
        return dict(zip(contenders, figures, strict=True)), plutino.seconds_by_stage(), sync_s


def _num_steps(turns: Turns) -> int:
    """Steps that plutino can take: it trains one step more in every turn, and the one that the last pause holds."""
    return turns.warmup_steps + turns.num_turns * (turns.steps_per_turn + 1) + 4


def _parts_table(per_step_seconds: Sequence[Mapping[str, float]]) -> str:
    lines = ["plutino, s/step" + "".join(f"{part:>11}" for part in PARTS)]
    for stage, seconds in enumerate(per_step_seconds):
        lines.append(f"        stage {stage}" + "".join(f"{seconds[part]:>11.4f}" for part in PARTS))
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pipeline", description=__doc__)
    parser.add_argument("--turns", type=int, default=Turns().num_turns, help="measured turns of each contender")
    parser.add_argument("--steps-per-turn", type=int, default=Turns().steps_per_turn, help="steps of one turn")
    parser.add_argument("--micro-batches", action="store_true", help="measure one process in micro-batches, too")
    parser.add_argument("--quick", action="store_true", help="a tiny model: see it run, quote nothing")
    parser.add_argument("--out", type=Path, default=None, help="where the figures go; by default benchmarks/results")
    return parser


if __name__ == "__main__":
    sys.exit(main())
