"""What a step's messages cost: ``python -m benchmarks.wire_step``.

Two stages of a random model, by turns: our executor and transport over gRPC in 1F1B, the same with forward passes that
run further ahead, and torch.distributed.pipelining over NCCL (gloo on processors). No coordinator stands behind any of
them: what a job takes longer is its vote and its commit. Beside the figures stands where our seconds went, by stage:
waiting, encoding, decoding, and processor seconds of each thread; of one step more, what its thread and its card did.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from benchmarks.agent_runs import TINY
from benchmarks.contender import ChildCommand, ChildContender, Contender, ContenderError
from benchmarks.measure import (
    RESULTS_DIR,
    Turns,
    figures_document,
    machine_facts,
    measure_in_turns,
    table,
    write_results,
)
from benchmarks.peers.workload import Workload
from benchmarks.scaling_cuda import SHAPES

_SHOWN_PARTS = ("total_s", "compute_s", "wait_s", "send_s", "encode_s", "decode_s")


def contenders(
    workload: Workload, cut: int, scratch: Path, *, device: str, threads: int, profiled_step: int
) -> list[ChildContender]:
    """All that take turns; the ones of ours leave their seconds in ``scratch/aheadN``."""
    found = []
    for ahead, name in ((0, "plutino, 1F1B"), (1, "plutino, running ahead")):
        folder = scratch / f"ahead{ahead}"
        folder.mkdir()
        arguments = [workload.to_json(), str(cut)]
        rest = [str(folder), device, str(ahead), str(profiled_step)]
        found.append(_pair(name, "benchmarks.peers.bare_pipeline", arguments, rest, threads))
    backend = ["cuda"] if device == "cuda" else []
    name = f"torch over {'NCCL' if backend else 'gloo'}"
    arguments = [workload.to_json(), str(cut)]
    rest = [str(scratch / "rendezvous"), *backend]
    return [*found, _pair(name, "benchmarks.peers.torch_pipelining", arguments, rest, threads)]


def _pair(name: str, module: str, before: Sequence[str], behind: Sequence[str], threads: int) -> ChildContender:
    commands = [ChildCommand(("-m", module, *before, str(rank), *behind), threads=threads) for rank in range(2)]
    return ChildContender(name, commands)


def seconds_by_stage(folder: Path, *, num_warmup: int) -> list[dict[str, Any]]:
    """Medians of a contender's warm steps, by stage, and the profile of the step that has one."""
    found = []
    for path in sorted(folder.glob("rank*.json")):
        steps: list[dict[str, Any]] = json.loads(path.read_text())
        warm = [step for step in steps[num_warmup:] if "profile" not in step]
        parts: dict[str, Any] = {part: statistics.median(step[part] for step in warm) for part in _SHOWN_PARTS}
        names = {name for step in warm for name in step["processor_s"]}
        parts["processor_s"] = {
            name: round(statistics.mean(step["processor_s"].get(name, 0.0) for step in warm), 4) for name in names
        }
        profiled = [step for step in steps if "profile" in step]
        found.append(parts | {key: profiled[0][key] for key in ("profile", "profile_by_host") if profiled})
    return found


def main(arguments: list[str] | None = None) -> int:
    """Command line; gives the process's exit status."""
    options = _parser().parse_args(arguments)
    shapes = {shape.name: shape.workload for shape in SHAPES} | {"tiny": replace(TINY, num_micro_batches=4)}
    turns = Turns(num_turns=options.turns, steps_per_turn=options.steps)
    machine = machine_facts(("torch", "transformers", "peft", "grpcio"))
    documents: dict[str, Any] = {}
    failed: dict[str, str] = {}
    for name in options.shapes:
        try:
            documents[name] = _measured(name, shapes[name], turns, machine, options)
        except ContenderError as error:
            # One shape's failure is no reason to lose the others' figures.
            failed[name] = str(error)
            print(f"{name} failed: {error}", file=sys.stderr, flush=True)
        write_results(options.out, {"shapes": documents, "failed": failed})
    print(f"all figures: {options.out}")
    return 1 if failed else 0


def _measured(
    name: str, workload: Workload, turns: Turns, machine: Mapping[str, object], options: argparse.Namespace
) -> dict[str, Any]:
    """One shape's figures, shown and given."""
    with tempfile.TemporaryDirectory(prefix="plutino-wire-") as scratch:
        # The last step of all, so that no measured one pays for it.
        num_steps = turns.warmup_steps + turns.num_turns * turns.steps_per_turn
        profiled_step = num_steps - 1 if options.profile else -1
        found: list[Contender] = [
            *contenders(
                workload,
                workload.num_blocks // 2,
                Path(scratch),
                device=options.device,
                threads=options.threads,
                profiled_step=profiled_step,
            )
        ]
        figures = measure_in_turns(found, turns, report=lambda line: print(line, file=sys.stderr, flush=True))
        document = figures_document(figures, workload=asdict(workload), machine=machine, turns=turns)
        by_stage = {
            f"ahead {ahead}": seconds_by_stage(Path(scratch) / f"ahead{ahead}", num_warmup=turns.warmup_steps)
            for ahead in (0, 1)
        }
    print(f"{name}\n{table(figures, tokens_per_step=workload.tokens_per_step)}")
    for ahead, stages in by_stage.items():
        for index, parts in enumerate(stages):
            shown = ", ".join(f"{part} {parts[part]:.4f}" for part in _SHOWN_PARTS)
            print(f"{ahead}, stage {index}: {shown}\n    processor: {parts['processor_s']}")
            print("\n".join(parts.get("profile", [])))
            print("\n".join(parts.get("profile_by_host", [])), flush=True)
    return document | {"by_stage": by_stage}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.wire_step", description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="cuda takes two cards")
    parser.add_argument("--shapes", nargs="+", default=["tiny"], choices=[*(s.name for s in SHAPES), "tiny"])
    parser.add_argument("--turns", type=int, default=8, help="measured turns of each")
    parser.add_argument("--steps", type=int, default=2, help="steps of a turn")
    parser.add_argument("--threads", type=int, default=1, help="of each process")
    parser.add_argument("--profile", action="store_true", help="list what the last step did; that step counts little")
    parser.add_argument("--out", type=Path, default=RESULTS_DIR / "wire_step.json", help="where the figures go")
    return parser


if __name__ == "__main__":
    sys.exit(main())
