"""The planner's formulas against what torch and peft really do; everything else about it is tested without torch."""

from __future__ import annotations

from weakref import ref

import pytest
import torch
from peft import LoraConfig as PeftLoraConfig
from peft import get_peft_model
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

from edge_node.methods.dropout import SeededDropout, dropout_position
from edge_node.methods.lora_linear import use_lean_lora
from partitioner.activations import micro_batch_tokens, saved_block_bytes, workspace_bytes
from partitioner.adapter import adapter_params_of
from partitioner.model import describe_model
from partitioner.shape import JobShape
from plutino.families import family_of
from plutino.job.method import LoraConfig

ROWS, TOKENS, NUM_BLOCKS = 2, 48, 3
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
METHODS = {
    "all-linear": LoraConfig(rank=4),
    "two": LoraConfig(rank=4, target_modules=("q_proj", "v_proj", "c_attn")),
    "dora": LoraConfig(rank=4, use_dora=True),
    "dropout": LoraConfig(rank=4, dropout=0.1),
}


def config_of(family, num_blocks=NUM_BLOCKS):
    if family == "llama":
        return LlamaConfig(
            vocab_size=256,
            hidden_size=64,
            intermediate_size=160,
            num_hidden_layers=num_blocks,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
    return GPT2Config(vocab_size=256, n_embd=64, n_layer=num_blocks, n_head=4, bos_token_id=0, eos_token_id=0)


def table_of(family, num_blocks=NUM_BLOCKS):
    config = config_of(family, num_blocks)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    return describe_model(config.to_dict(), shapes, family_of(family))


def method_of(name, table):
    """Names of the other family's linears left out."""
    method = METHODS[name]
    if method.target_modules == "all-linear":
        return method
    own = {linear.name.rpartition(".")[2] for linear in table.block_linears[0]}
    return method.model_copy(update={"target_modules": tuple(n for n in method.target_modules if n in own)})


def peft_model(family, method, num_blocks=NUM_BLOCKS, dtype=torch.float32):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config_of(family, num_blocks)).to(dtype).eval()
    targets = method.target_modules if isinstance(method.target_modules, str) else list(method.target_modules)
    config = PeftLoraConfig(
        r=method.rank,
        target_modules=targets,
        rank_pattern=dict(method.rank_pattern),
        use_dora=method.use_dora,
        # gpt2's Conv1D; peft warns where it has to set it itself.
        fan_in_fan_out=family == "gpt2",
    )
    model = get_peft_model(model, config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    for name, module in model.named_modules():
        if not hasattr(module, "lora_dropout"):
            continue
        if method.dropout:
            module.lora_dropout["default"] = SeededDropout(method.dropout, name)
        if not method.use_dora:
            use_lean_lora(module, "default")
    return model


def shape_of(table, method, dtype):
    return JobShape(
        dtype=dtype,
        batch_rows=ROWS,
        micro_batch_rows=ROWS,
        row_tokens=TOKENS,
        label_tokens=1,
        has_dropout=method.dropout > 0,
        **adapter_params_of(table, method).shape_fields,
    )


def run_blocks(model, dtype):
    """Hidden states in, hidden states out, with one padded row as in training."""
    inner = model.base_model.model.get_decoder()
    hidden = torch.randn(ROWS, TOKENS, 64, dtype=dtype, requires_grad=True)
    mask = torch.ones(ROWS, TOKENS, dtype=torch.long)
    mask[0, -3:] = 0
    with dropout_position(seed=0, step=0, micro_batch=0):
        return inner(inputs_embeds=hidden, attention_mask=mask, use_cache=False).last_hidden_state


class Kept:
    """Lives as long as the graph node that saved the tensor."""

    def __init__(self, tensor):
        self.tensor = tensor


def saved_bytes(model, dtype):
    """Bytes of the distinct storages that the graph still holds after the forward pass."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    held = []

    def pack(tensor):
        kept = Kept(tensor)
        held.append(ref(kept))
        return kept

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept.tensor):
        output = run_blocks(model, dtype)
    alive = [kept.tensor.untyped_storage() for reference in held if (kept := reference()) is not None]
    del output
    return sum({storage.data_ptr(): storage.nbytes() for storage in alive if storage.data_ptr() not in own}.values())


@pytest.mark.parametrize("method_name", METHODS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_saved_block_bytes_equals_what_autograd_keeps_of_one_block(family, dtype, method_name):
    table = table_of(family)
    method = method_of(method_name, table)
    two, three = (saved_bytes(peft_model(family, method, n, DTYPES[dtype]), DTYPES[dtype]) for n in (2, 3))

    predicted = saved_block_bytes(table, shape_of(table, method, dtype), 1)

    # DoRA keeps a few vectors of the weights' size beside the activations.
    assert 1 - (0.02 if method.use_dora else 0) <= predicted / (three - two) <= 1.05


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize(
    "method", [LoraConfig(rank=4), LoraConfig(rank=4, use_dora=True), LoraConfig(rank=6, rank_pattern={"1.*": 2})]
)
def test_adapter_params_equal_those_that_peft_creates(family, method):
    trainable = {
        name: parameter.numel() for name, parameter in peft_model(family, method).named_parameters() if "lora" in name
    }

    blocks = adapter_params_of(table_of(family), method).blocks

    for index, block in enumerate(blocks):
        assert block.params == sum(size for name, size in trainable.items() if f".{index}." in name)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_workspace_covers_the_backward_peak(family, dtype):
    method = METHODS["all-linear"]
    table = table_of(family)
    shape = shape_of(table, method, dtype)
    model = peft_model(family, method, dtype=DTYPES[dtype])

    def step():
        output = run_blocks(model, DTYPES[dtype])
        output.backward(torch.ones_like(output))

    step()
    peak = peak_bytes(step)

    saved = sum(saved_block_bytes(table, shape, block) for block in range(NUM_BLOCKS))
    ends = micro_batch_tokens(shape) * (64 * 16 + 64)  # hidden states in and out, final norm, rotary angles
    assert peak <= saved + workspace_bytes(table, shape) + ends


def peak_bytes(step):
    """Most bytes that torch's CPU allocator handed out at once during a call."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak
