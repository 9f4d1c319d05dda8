"""Peer: one stage of our own pipeline without a coordinator: the worker's executor, its transport over gRPC, no vote.

``python -m benchmarks.peers.bare_pipeline WORKLOAD_JSON CUTS RANK RENDEZVOUS_DIR DEVICE AHEAD [PROFILED_STEP]`` as
:mod:`benchmarks.peers.torch_pipelining`; DEVICE is cpu or cuda, AHEAD is 1 where stages run ahead. What a step costs
beside it in a job is the coordinator's part. Each rank leaves where its seconds went in ``RENDEZVOUS_DIR/rankN.json``,
and of the profiled step a list of what its thread and its card did.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.contender import START_TIMEOUT_S, serve_steps
from benchmarks.peers.workload import Workload, batch
from edge_node.engine.executor import StageExecutor
from edge_node.engine.optimizer import StageOptimizer
from edge_node.engine.unit import UnitInput
from edge_node.methods.registry import METHODS
from edge_node.objectives.sft import SftObjective
from edge_node.stage.build import build_stage
from edge_node.stage.random_source import RandomSource
from edge_node.transport.base import Peer
from edge_node.transport.peer import PeerTransport
from plutino.data.batches import MicroBatchRows
from plutino.job.assignment import StageShape
from plutino.job.method import LoraConfig
from plutino.job.training import TrainingConfig
from plutino.types import JobId, Unit, UnitKind
from plutino.wire.messages import Bounds

_POLL_S = 0.05
_NUM_LISTED = 40


def model_config(workload: Workload) -> dict[str, Any]:
    """config.json of the workload's model."""
    return {
        "model_type": "llama",
        "hidden_size": workload.hidden_dim,
        "intermediate_size": workload.intermediate_dim,
        "num_hidden_layers": workload.num_blocks,
        "num_attention_heads": workload.num_heads,
        "num_key_value_heads": workload.num_heads,
        "vocab_size": workload.vocab_size,
        "max_position_embeddings": workload.seq_len_tokens,
        "tie_word_embeddings": False,
    }


def micro_batches(workload: Workload, step: int) -> tuple[MicroBatchRows, ...]:
    """A step's rows, loss on every token."""
    rows, tokens = workload.batch_size // workload.num_micro_batches, workload.seq_len_tokens
    return tuple(
        MicroBatchRows(
            input_ids=part.reshape(-1).numpy().astype(np.int32),
            label_mask=np.ones(part.numel(), np.uint8),
            lengths=np.full(rows, tokens, np.int32),
            padded_tokens=tokens,
            sample_indices=tuple(range(index * rows, (index + 1) * rows)),
        )
        for index, part in enumerate(batch(workload, step).split(rows))
    )


def thread_seconds() -> dict[str, float]:
    """Processor seconds of this process's threads by name; threads of C libraries together as "native"."""
    names = {thread.native_id: thread.name for thread in threading.enumerate()}
    tick_s = 1 / os.sysconf("SC_CLK_TCK")
    found: dict[str, float] = {}
    for task in Path("/proc/self/task").iterdir():
        try:
            fields = (task / "stat").read_text().rpartition(")")[2].split()
        except FileNotFoundError:  # it has just ended
            continue
        name = names.get(int(task.name), "native")
        found[name] = found.get(name, 0.0) + tick_s * (int(fields[11]) + int(fields[12]))
    return found


def exchange(folder: Path, rank: int, num_ranks: int, address: str) -> dict[Peer, str]:
    """Everybody's address by way of a folder.

    Raises:
        TimeoutError: somebody did not come.
    """
    part = folder / f"address{rank}.part"
    part.write_text(address)
    part.replace(folder / f"address{rank}")
    deadline_s = time.monotonic() + START_TIMEOUT_S
    paths = [folder / f"address{other}" for other in range(num_ranks)]
    while not all(path.is_file() for path in paths):
        if time.monotonic() > deadline_s:
            raise TimeoutError(f"not all of {num_ranks} stages came within {START_TIMEOUT_S:g} s")
        time.sleep(_POLL_S)
    return {Peer(other): path.read_text() for other, path in enumerate(paths)}


def main() -> None:
    """Train as ordered on stdin."""
    workload, rank = Workload.from_json(sys.argv[1]), int(sys.argv[3])
    cuts = [int(cut) for cut in sys.argv[2].split(",")]
    folder, is_on_cards, ahead = Path(sys.argv[4]), sys.argv[5] == "cuda", int(sys.argv[6])
    profiled_step = int(sys.argv[7]) if len(sys.argv) > 7 else -1
    borders = [0, *cuts, workload.num_blocks]
    num_stages = len(borders) - 1
    device = torch.device("cuda", rank) if is_on_cards else torch.device("cpu")
    if is_on_cards:
        torch.cuda.set_device(device)
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    stages = [
        StageShape(start_block=borders[k], end_block=borders[k + 1], ahead=ahead * (num_stages - 1 - k))
        for k in range(num_stages)
    ]
    source = RandomSource(model_config(workload), dtype=torch.bfloat16, device=device)
    stage = build_stage(source, borders[rank], borders[rank + 1], dtype=torch.bfloat16, device=device)
    lora = LoraConfig(rank=workload.lora_rank, alpha=2 * workload.lora_rank, target_modules="all-linear")
    method = METHODS["lora"](stage, lora, seed=workload.seed)
    tokens = workload.tokens_per_step // workload.num_micro_batches
    largest_bytes = 4 * workload.hidden_dim * tokens + (1 << 20)
    transport = PeerTransport(
        JobId("bare"),
        1,
        Peer(rank),
        bounds=Bounds(max_message_bytes=largest_bytes, max_inbox_bytes=4 * largest_bytes),
        is_for_card=is_on_cards,
    )
    executor = StageExecutor(
        stage=stage,
        method=method,
        objective=SftObjective(),
        optimizer=StageOptimizer(method.parameters, TrainingConfig(lr=workload.lr, lr_schedule="constant"), 1),
        transport=transport,
        stages=stages,
        me=Peer(rank),
        seed=workload.seed,
    )
    transport.connect(exchange(folder, rank, num_stages, transport.address))
    label_tokens = workload.batch_size * (workload.seq_len_tokens - 1)
    reads_rows = rank in (0, num_stages - 1)
    told: list[dict[str, Any]] = []

    def run_step(step: int) -> float | None:
        rows = micro_batches(workload, step) if reads_rows else (None,) * workload.num_micro_batches
        unit = Unit(UnitKind.TRAIN, step)
        threads_before, usage_before = thread_seconds(), transport.usage
        recording = profile(activities=_activities(is_on_cards)) if step == profiled_step else nullcontext()
        with recording as profiled:
            outcome = executor.train_step(UnitInput(unit, workload.num_micro_batches, float(label_tokens), rows))
            executor.commit(step, 1.0)
            if is_on_cards:
                torch.cuda.synchronize()
        transport.finish(unit)
        threads = {name: s - threads_before.get(name, 0.0) for name, s in thread_seconds().items()}
        told.append(
            {
                "step": step,
                "total_s": outcome.times.total_s,
                "compute_s": outcome.times.compute_s,
                "wait_s": outcome.times.wait_s,
                "send_s": outcome.times.send_s,
                "encode_s": transport.usage.encode_s - usage_before.encode_s,
                "decode_s": transport.usage.decode_s - usage_before.decode_s,
                "processor_s": {name: round(s, 3) for name, s in threads.items() if s > 0},
            }
        )
        if profiled is not None:
            told[-1]["profile"] = _listed(profiled, "self_cuda_time_total" if is_on_cards else "self_cpu_time_total")
            told[-1]["profile_by_host"] = _listed(profiled, "self_cpu_time_total")
        (folder / f"rank{rank}.json").write_text(json.dumps(told, indent=1))
        return outcome.loss_sum / label_tokens if rank == num_stages - 1 else None

    try:
        serve_steps(run_step, {"threads": torch.get_num_threads(), "cuts": cuts, "ahead": ahead})
    finally:
        transport.close()


def _activities(is_on_cards: bool) -> list[ProfilerActivity]:
    return [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if is_on_cards else [])]


def _listed(profiled: Any, sort_by: str) -> list[str]:
    averages: Callable[[], Any] = profiled.key_averages
    return str(averages().table(sort_by=sort_by, row_limit=_NUM_LISTED, max_name_column_width=60)).splitlines()


if __name__ == "__main__":
    main()
