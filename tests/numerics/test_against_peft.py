"""One stage of plutino against a plain transformers + peft loop: the shipped model on the shipped rows."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import peft
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, get_scheduler

from coordinator.jobs.barrier import clip_scale, total_norm
from edge_node.engine.reference import InProcessPipeline
from edge_node.stage.weights import LocalSource
from plutino.assets import SNIPS_DIR, TINY_LLAMA_DIR
from plutino.data.batches import StepBatch, batch_indices, cut_micro_batches
from plutino.data.readers import read_rows
from plutino.data.tokenisation import tokenise
from plutino.data.tokenizer import load_tokenizer
from plutino.job.assignment import StageShape
from plutino.job.data import DataConfig
from plutino.job.method import LoraConfig
from plutino.job.model import ModelConfig
from plutino.job.spec import JobSpec
from plutino.job.training import TrainingConfig
from tests.numerics.pipelines import padded

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

NUM_STEPS = 20
SPEC = JobSpec(
    model=ModelConfig(path=str(TINY_LLAMA_DIR)),
    method=LoraConfig(rank=16, alpha=32),
    data=DataConfig(train=str(SNIPS_DIR / "train.jsonl")),
    # 0.1 clips every step of these, 1.0 hardly any.
    training=TrainingConfig(steps=NUM_STEPS, batch_size=4, lr=2e-3, weight_decay=0.01, max_grad_norm=0.1),
)


@dataclass
class Run:
    """What a training loop did."""

    initial: dict[str, Tensor]
    losses: list[float]
    norms: list[float]
    first_gradients: dict[str, Tensor]
    final: dict[str, Tensor]


@cache
def batches() -> list[StepBatch]:
    samples = tokenise(read_rows(SNIPS_DIR / "train.jsonl"), load_tokenizer(TINY_LLAMA_DIR), max_tokens=128)
    size = SPEC.training.batch_size
    indices = [batch_indices(step, size, len(samples.lengths), seed=0) for step in range(NUM_STEPS)]
    return [cut_micro_batches(samples, of_step, 2) for of_step in indices]


def run_plutino() -> Run:
    source = LocalSource(TINY_LLAMA_DIR)
    num_blocks = source.config()["num_hidden_layers"]
    losses, norms, first_gradients = [], [], {}
    with InProcessPipeline(
        lambda: source, SPEC, [StageShape(start_block=0, end_block=num_blocks)], total_steps=NUM_STEPS
    ) as pipeline:
        (executor,) = pipeline.executors.values()
        initial = pipeline.state()
        for step, batch in enumerate(batches()):
            (outcome,) = pipeline.train_step(step, batch.micro_batches, float(batch.loss_weight)).values()
            if step == 0:
                first_gradients = {name: gradient.clone() for name, gradient in executor._gradients.items()}
            names = [parameter.name for parameter in executor.method.parameters]
            norms.append(total_norm(dict(zip(names, outcome.squared_norms, strict=True))))
            losses.append(outcome.loss_sum / batch.loss_weight)
            pipeline.commit(step, clip_scale(norms[-1], SPEC.training.max_grad_norm))
        return Run(initial, losses, norms, first_gradients, pipeline.state())


def run_peft(initial: dict[str, Tensor]) -> Run:
    """As a person would write it, with gradient accumulation over the same micro-batches."""
    base = AutoModelForCausalLM.from_pretrained(TINY_LLAMA_DIR, dtype=torch.float32)
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules="all-linear")
    model = peft.get_peft_model(base, config).eval()
    assert not peft.set_peft_model_state_dict(model, initial).unexpected_keys
    trained = {name.replace(".default", ""): p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), lr=SPEC.training.lr, weight_decay=SPEC.training.weight_decay)
    scheduler = get_scheduler("linear", optimizer, num_warmup_steps=0, num_training_steps=NUM_STEPS)
    losses, norms, first_gradients = [], [], {}
    for step, batch in enumerate(batches()):
        total = 0.0
        for ids, labels, mask in map(padded, batch.micro_batches):
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
            loss = cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
            (loss / batch.loss_weight).backward()
            total += loss.item()
        losses.append(total / batch.loss_weight)
        if step == 0:
            first_gradients = {name: parameter.grad.clone() for name, parameter in trained.items()}
        norms.append(nn.utils.clip_grad_norm_(trained.values(), SPEC.training.max_grad_norm).item())
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
    return Run(initial, losses, norms, first_gradients, {name: p.detach() for name, p in trained.items()})


@pytest.fixture(scope="module")
def runs(one_thread) -> tuple[Run, Run]:
    ours = run_plutino()
    return ours, run_peft(ours.initial)


def relative_distance(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Norm of the difference over the norm of what is expected, all parameters together."""
    assert found.keys() == expected.keys()
    difference = sum(float((found[name].double() - expected[name].double()).square().sum()) for name in expected)
    return (difference / sum(float(tensor.double().square().sum()) for tensor in expected.values())) ** 0.5


def test_losses_are_those_of_transformers_and_peft(runs):
    ours, stock = runs

    assert max(abs(a - b) for a, b in zip(ours.losses, stock.losses, strict=True)) < 1e-5
    assert ours.losses[-1] < 0.5 * ours.losses[0]


def test_first_gradients_are_those_of_transformers_and_peft(runs):
    ours, stock = runs

    assert relative_distance(ours.first_gradients, stock.first_gradients) < 1e-6


def test_every_step_was_clipped_as_torch_clips(runs):
    ours, stock = runs

    assert min(stock.norms) > SPEC.training.max_grad_norm
    assert ours.norms == pytest.approx(stock.norms, rel=1e-4)  # torch adds up in fp32


def test_final_adapter_is_that_of_transformers_and_peft(runs):
    ours, stock = runs
    learned = [{name: run.final[name] - run.initial[name] for name in run.final} for run in runs]

    assert relative_distance(ours.final, stock.final) < 1e-3
    # Stricter than of the parameters, most of which is where they started.
    assert relative_distance(*learned) < 1e-3
