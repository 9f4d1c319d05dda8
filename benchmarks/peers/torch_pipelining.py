"""Peer: one stage of torch's own pipeline (torch.distributed.pipelining, 1F1B) over gloo, or over NCCL on cards.

``python -m benchmarks.peers.torch_pipelining WORKLOAD_JSON CUTS RANK RENDEZVOUS_FILE [cuda]`` where CUTS are the first
blocks of all stages but the first one, such as ``6`` for two stages of a model of 12 blocks.
"""

from __future__ import annotations

import sys
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B
from torch.nn import functional
from transformers import LlamaForCausalLM

from benchmarks.contender import STEP_TIMEOUT_S, serve_steps
from benchmarks.peers.workload import Workload, batch, build_model, trainable_parameters


class Stage(nn.Module):
    """Blocks ``[start_block, end_block)`` of a model: its own class with the other blocks taken out.

    torch.distributed.pipelining cannot trace these models (pytorch #184361), hence stages by hand.
    """

    def __init__(self, model: LlamaForCausalLM, start_block: int, end_block: int) -> None:
        super().__init__()
        self.is_first = start_block == 0
        is_last = end_block == len(model.model.layers)
        self.decoder = model.model
        self.decoder.layers = self.decoder.layers[start_block:end_block]
        if not self.is_first:
            self.decoder.embed_tokens = None
        if not is_last:
            self.decoder.norm = nn.Identity()
        self.head = model.lm_head if is_last else nn.Identity()

    def forward(self, inputs: Tensor) -> Tensor:
        """Token ids [B, T] or hidden states [B, T, D] to hidden states [B, T, D] or logits [B, T, V]."""
        key = "input_ids" if self.is_first else "inputs_embeds"
        hidden = self.decoder(**{key: inputs}, use_cache=False).last_hidden_state
        logits_or_hidden = self.head(hidden)
        assert isinstance(logits_or_hidden, Tensor)
        return logits_or_hidden


def next_token_loss(logits: Tensor, input_ids: Tensor) -> Tensor:
    """Mean token loss of logits [B, T, V] in fp32, as transformers takes it."""
    return functional.cross_entropy(logits[:, :-1].float().flatten(0, 1), input_ids[:, 1:].flatten())


def main() -> None:
    """Train as ordered on stdin."""
    workload, cuts, rank = (
        Workload.from_json(sys.argv[1]),
        [int(cut) for cut in sys.argv[2].split(",")],
        int(sys.argv[3]),
    )
    bounds = [0, *cuts, workload.num_blocks]
    num_stages = len(bounds) - 1
    is_on_cards = sys.argv[5:] == ["cuda"]
    device = torch.device("cuda", rank) if is_on_cards else torch.device("cpu")
    if is_on_cards:
        torch.cuda.set_device(device)
    with device:
        whole = build_model(workload).train()
    llama = whole.get_base_model()
    assert isinstance(llama, LlamaForCausalLM)
    stage = Stage(llama, bounds[rank], bounds[rank + 1])
    del whole, llama
    dist.init_process_group(
        "nccl" if is_on_cards else "gloo",
        init_method=f"file://{sys.argv[4]}",
        rank=rank,
        world_size=num_stages,
        timeout=timedelta(seconds=STEP_TIMEOUT_S),
    )
    optimizer = torch.optim.AdamW(trainable_parameters(stage), lr=workload.lr)
    schedule = Schedule1F1B(
        PipelineStage(stage, rank, num_stages, device),
        n_microbatches=workload.num_micro_batches,
        loss_fn=next_token_loss,
    )

    def run_step(step: int) -> float | None:
        input_ids = batch(workload, step).to(device)
        losses: list[Tensor] = []
        arguments = (input_ids,) if rank == 0 else ()
        if rank == num_stages - 1:
            schedule.step(*arguments, target=input_ids, losses=losses, return_outputs=False)
        else:
            schedule.step(*arguments, return_outputs=False)
        optimizer.step()
        optimizer.zero_grad()
        if is_on_cards:
            torch.cuda.synchronize()
        return float(torch.stack(losses).mean()) if losses else None

    serve_steps(run_step, {"threads": torch.get_num_threads(), "cuts": cuts})
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
