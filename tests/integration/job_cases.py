"""What the tests of whole jobs share: a small job, who runs it, and what must come of it."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from coordinator.jobs.lineage import LedgerRow, LedgerStatus
from plutino.assets import TINY_LLAMA_DIR
from plutino.data.batches import batch_indices
from plutino.job.spec import JobSpec
from protos import jobs_pb2
from tests.integration.stack import People, ThreadAgent, ThreadCoordinator, make_spec, wait_until

NUM_ROWS = 40
STEPS = 8
BATCH = 4


def save_small_model(folder: Path) -> Path:
    """A random 4-block llama with the tokenizer of the shipped model."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=4096,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        (folder / name).write_bytes((TINY_LLAMA_DIR / name).read_bytes())
    return folder


def small_spec(model_dir: Path, rows_file: Path, output: Path, *, stages: int = 2, **training: object) -> JobSpec:
    settings = {"steps": STEPS, "batch_size": BATCH, "micro_batch_size": 2, "lr": 1e-2, "shadow_every": 2}
    return make_spec(
        model_dir,
        rows_file,
        output,
        data={"eval": str(rows_file), "eval_limit": 8},
        training={**settings, **training},
        placement={"stages": stages},
        method={"type": "lora", "rank": 4},
    )


def adapter_bytes(folder: Path) -> bytes:
    return (folder / "adapter_model.safetensors").read_bytes()


def start(
    stack: ExitStack, state_dir: Path, num_agents: int, *, lease_s: float = 15.0
) -> tuple[People, list[ThreadAgent]]:
    coordinator = ThreadCoordinator(state_dir, lease_s=lease_s)
    stack.callback(coordinator.close)
    return attach(stack, coordinator.endpoints.devices_address, coordinator.endpoints.people_address, num_agents)


def attach(
    stack: ExitStack, devices_address: str, people_address: str, num_agents: int
) -> tuple[People, list[ThreadAgent]]:
    people = People(people_address)
    stack.callback(people.close)
    agents = [ThreadAgent(devices_address, f"device{i}") for i in range(num_agents)]
    for agent in agents:
        stack.callback(agent.close)
    wait_until(lambda: len(people.devices()) == num_agents, "all agents attached")
    return people, agents


def addresses_of(coordinator: ThreadCoordinator) -> tuple[str, str]:
    return coordinator.endpoints.devices_address, coordinator.endpoints.people_address


def lineage_rows(detail: dict[str, object]) -> list[LedgerRow]:
    return [
        LedgerRow(
            step=row["step"],
            plan_epoch=row["plan_epoch"],
            status=LedgerStatus(row["status"]),
            sample_indices=tuple(row["samples"]),
        )
        for row in detail["ledger"]  # type: ignore[attr-defined]
    ]


def expected_samples(steps: int = STEPS) -> list[int]:
    return [index for step in range(steps) for index in batch_indices(step, BATCH, NUM_ROWS, 0)]


def cancel_request(job_id: str) -> jobs_pb2.CancelRequest:
    return jobs_pb2.CancelRequest(job_id=job_id)
