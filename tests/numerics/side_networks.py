"""Chains of stages with a side network, and what is checked of every kind of one."""

from __future__ import annotations

import json

import torch
from safetensors.torch import save_file
from torch.nn import functional
from transformers import AutoModelForCausalLM

from edge_node.methods.parallel_adapters import attach_parallel_adapters
from edge_node.stage.passes import StageInput
from partitioner.activations import saved_block_bytes
from partitioner.adapter import adapter_params_of
from partitioner.shape import JobShape
from plutino.job.method import ParallelAdaptersConfig
from plutino.load_adapter import load_adapter
from tests.numerics.chain import build_chain
from tests.numerics.tiny_families import describe_folder

SMALL = ParallelAdaptersConfig(reduction=2)


def attach(stages, config=SMALL, seed=1):
    return [attach_parallel_adapters(stage, config, seed=seed) for stage in stages]


def state_of(methods):
    return {name: value for method in methods for name, value in method.state().items()}


def move(methods, seed=11):
    """Values far from the start, where the side network reaches the head with nothing."""
    generator = torch.Generator().manual_seed(seed)
    values = state_of(methods)
    values = {
        name: value + 0.2 * torch.randn(value.shape, generator=generator) for name, value in sorted(values.items())
    }
    for method in methods:
        method.load(values)
    return values


def run(stages, batch):
    """Logits of a chain, and what carries the gradient down its borders, of the side state alone."""
    hidden, side, borders = None, None, []
    for stage in stages:
        received = None if side is None else side.detach().requires_grad_(True)
        if side is not None:
            borders.append((side, received))
        inputs = StageInput(
            position_ids=batch.position_ids,
            input_ids=batch.input_ids if stage.is_first else None,
            hidden=None if hidden is None else hidden.detach(),
            side=received,
            attention_mask=batch.attention_mask,
            segment_ids=batch.segment_ids,
        )
        output = stage.run(inputs)
        hidden, side = output.hidden, output.side

    def finish():
        for sent, received in reversed(borders):
            sent.backward(received.grad)

    return stages[-1].head(hidden), finish


def loss_of(logits, batch):
    return functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch.input_ids[:, 1:].flatten(), reduction="sum")


def gradients(stages, methods, batch):
    logits, finish = run(stages, batch)
    loss_of(logits, batch).backward()
    finish()
    return logits.detach(), {p.name: p.uses[0][1].grad for method in methods for p in method.parameters}


def stage_input(batch):
    return StageInput(position_ids=batch.position_ids, input_ids=batch.input_ids, attention_mask=batch.attention_mask)


def publish(values, method, folder):
    folder.mkdir()
    save_file(values, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(method.peft_config()))


def check_start_split_and_loading(folder, batch, config, adapter_dir):
    """Step 0 is the base; three stages give the bits of one, in blocks that get no gradient; others load the result."""
    whole, split = (build_chain(folder, n, attention=None) for n in (1, 3))
    with torch.no_grad():
        base = whole[0].head(whole[0].forward(stage_input(batch)))
    methods, split_methods = attach(whole, config), attach(split, config)
    for key, parameter in whole[0].side.by_key().items():
        assert methods[0].state()[key].shape == parameter.shape
    assert state_of(methods).keys() == state_of(split_methods).keys()
    for key, value in state_of(methods).items():
        assert torch.equal(state_of(split_methods)[key], value), key
    with torch.no_grad():
        assert torch.equal(run(whole, batch)[0], base)
        assert torch.equal(run(split, batch)[0], base)

    values = move(methods)
    for method in split_methods:
        method.load(values)
    logits, found = gradients(whole, methods, batch)
    split_logits, split_found = gradients(split, split_methods, batch)

    assert not torch.equal(logits, base)
    assert torch.equal(split_logits, logits)
    assert all(torch.equal(split_found[key], gradient) for key, gradient in found.items())
    assert not [n for stage in whole + split for n, p in stage.model.named_parameters() if p.grad is not None]
    publish(values, methods[0], adapter_dir)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    loaded = load_adapter(model, adapter_dir)
    with torch.no_grad():
        torch.testing.assert_close(model(**batch.model_inputs).logits, logits, rtol=1e-5, atol=1e-5)
        with loaded.disable_adapter():
            torch.testing.assert_close(model(**batch.model_inputs).logits, base, rtol=1e-5, atol=1e-5)
    return values


def billed_over_kept(folder, batch, config, dtype="fp32"):
    """The planner's bytes that a side block keeps for the backward pass, over those that one more really keeps."""
    kept = []
    for blocks in ((1, 2), (1, 2, 3)):
        (stage,) = build_chain(folder, 1, attention=None, dtype={"fp32": torch.float32, "bf16": torch.bfloat16}[dtype])
        attach([stage], config.model_copy(update={"blocks": blocks}))
        own = {p.untyped_storage().data_ptr() for p in [*stage.model.parameters(), *stage.side.parameters()]}
        saved = {}

        def pack(tensor, saved=saved, own=own):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                saved[storage.data_ptr()] = (storage.nbytes(), tensor)  # held, so that no address comes twice
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            stage.run(stage_input(batch))
        kept.append(sum(num_bytes for num_bytes, _ in saved.values()))
    rows, tokens = batch.input_ids.shape
    table = describe_folder(folder)
    fields = adapter_params_of(table, config).shape_fields
    shape = JobShape(dtype=dtype, batch_rows=rows, micro_batch_rows=rows, row_tokens=tokens, label_tokens=1, **fields)
    return saved_block_bytes(table, shape, 3) / (kept[1] - kept[0])
