"""Peer: stock transformers and peft in one process that holds the whole model.

``python -m benchmarks.peers.one_process WORKLOAD_JSON NUM_MICRO_BATCHES``
"""

from __future__ import annotations

import sys

import torch

from benchmarks.contender import serve_steps
from benchmarks.peers.workload import Workload, batch, build_model, trainable_parameters


def main() -> None:
    """Train as ordered on stdin."""
    workload, num_micro_batches = Workload.from_json(sys.argv[1]), int(sys.argv[2])
    model = build_model(workload).train()
    parameters = trainable_parameters(model)
    optimizer = torch.optim.AdamW(parameters, lr=workload.lr)

    def run_step(step: int) -> float:
        loss_sum = 0.0
        for rows in batch(workload, step).chunk(num_micro_batches):
            loss = model(input_ids=rows, labels=rows, use_cache=False).loss / num_micro_batches
            loss.backward()
            loss_sum += loss.item()
        optimizer.step()
        optimizer.zero_grad()
        return loss_sum

    facts = {
        "threads": torch.get_num_threads(),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "trainable_parameters": sum(parameter.numel() for parameter in parameters),
    }
    serve_steps(run_step, facts)


if __name__ == "__main__":
    main()
