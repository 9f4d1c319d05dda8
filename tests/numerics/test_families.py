"""Every family against transformers and stock peft: a row of ``tiny_families.CONFIGS`` is all a new one adds here."""

from __future__ import annotations

import json
from functools import reduce
from operator import or_
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import save_file
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from edge_node.methods.lora import attach_lora
from edge_node.profile import measure
from edge_node.stage.architecture import make_packed_masks, make_position_ids
from edge_node.stage.build import build_stage
from edge_node.stage.weights import LocalSource
from partitioner.adapter import adapter_params_of
from partitioner.device import ProfileRequest
from partitioner.memory import stage_memory
from partitioner.shape import JobShape
from plutino.errors import ConfigError, ModelError
from plutino.families import FAMILIES, family_of
from plutino.job.method import LoraConfig
from plutino.sizes import SMALLEST_MAPPING_BYTES
from tests.numerics.chain import CUTS, Batch, build_chain, frozen_chain, make_batch, run_chain
from tests.numerics.pipelines import assert_same_tensors, make_batches, make_spec, pipeline_of, stages_of, train
from tests.numerics.tiny_families import (
    CONFIGS,
    ENCODER_DECODERS,
    ENCODERS,
    NUM_BLOCKS,
    describe_folder,
    make_config,
    save_model,
)
from tests.sampling import sampled

# peft itself calls what transformers has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

KINDS = ("full", "right", "left", "packed")
EVERY_CASE = [(name, kind, num_stages) for name in CONFIGS for kind in KINDS for num_stages in (2, 3)]
# Each model meets another kind of batch and another number of stages; all of them under slow.
SAMPLE = [(name, KINDS[i % 4], 2 + i % 3 % 2) for i, name in enumerate(CONFIGS)]
SAMPLE += [(name, "packed", 3) for name in ("mistral", "gemma2", "qwen2", "opt_projected")]


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """Model name -> its folder, saved when it is first asked for."""

    class Folders(dict):
        def __missing__(self, name: str) -> Path:
            self[name] = save_model(name, tmp_path_factory.mktemp(name))
            return self[name]

    return Folders()


def load_whole(folder: Path):
    family = family_of(json.loads((folder / "config.json").read_text())["model_type"])
    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation=family.attention).eval()


def whole_inputs(model, batch: Batch) -> dict:
    """transformers finds packed rows by their positions, but for two families that do not look at them."""
    inputs = batch.model_inputs
    if batch.segment_ids is not None and model.config.model_type in ("opt", "falcon"):
        attention = family_of(model.config.model_type).attention
        inputs["attention_mask"] = make_packed_masks(
            model.config, batch.segment_ids, None, dtype=torch.float32, attention=attention
        )
    return inputs


def is_alibi(name: str) -> bool:
    return name in ("bloom", "falcon_alibi")


def all_linears(family) -> list[str]:
    return sorted({name.rpartition(".")[2] for name in family.linears})


def stock_model(folder: Path, rank: int = 2):
    base = load_whole(folder)
    family = family_of(base.config.model_type)
    config = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=rank,
        lora_alpha=LoraConfig().alpha,
        target_modules=all_linears(family),
        fan_in_fan_out=family.has_conv1d,
    )
    return peft.get_peft_model(base, config).eval()


def loss_of(logits, batch: Batch):
    return cross_entropy(logits[:, :-1].flatten(0, 1), batch.input_ids[:, 1:].flatten(), reduction="sum")


def check_split_equals_whole(folder: Path, kind: str, num_stages: int) -> None:
    stages = build_chain(folder, num_stages, attention=None)
    methods = [attach_lora(stage, LoraConfig(rank=2), seed=7) for stage in stages]
    stock = stock_model(folder)
    generator = torch.Generator().manual_seed(11)
    values = {
        name: value + 0.05 * torch.randn(value.shape, generator=generator)
        for name, value in sorted(reduce(or_, (method.state() for method in methods)).items())
    }
    for method in methods:
        method.load(values)
    peft.set_peft_model_state_dict(stock, values)
    batch = make_batch(kind)

    logits, backward_over_boundaries = run_chain(stages, batch)
    loss_of(logits, batch).backward()
    backward_over_boundaries()
    expected = stock(**whole_inputs(stock, batch)).logits
    loss_of(expected, batch).backward()

    assert torch.equal(logits, expected)
    gradients = {p.name: p.uses[0][1].grad for method in methods for p in method.parameters}
    whole = {
        name.replace(".default", ""): parameter.grad for name, parameter in stock.named_parameters() if "lora" in name
    }
    assert_same_tensors(gradients, whole)
    assert any(gradient.abs().max() > 0 for gradient in gradients.values())


@pytest.mark.parametrize(
    ("name", "kind", "num_stages"), [case for case in SAMPLE if case[1] != "packed" or not is_alibi(case[0])]
)
def test_split_gives_the_whole_models_logits_and_gradients_bit_for_bit(folders, name, kind, num_stages):
    check_split_equals_whole(folders[name], kind, num_stages)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "kind", "num_stages"),
    [case for case in EVERY_CASE if case not in SAMPLE and (case[1] != "packed" or not is_alibi(case[0]))],
)
def test_split_gives_the_whole_models_logits_and_gradients_bit_for_bit_everywhere(folders, name, kind, num_stages):
    check_split_equals_whole(folders[name], kind, num_stages)


@pytest.mark.parametrize("name", CONFIGS)
def test_attention_backend_is_the_one_that_transformers_chooses(name):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(make_config(name))

    assert family_of(model.config.model_type).attention == model.config._attn_implementation


ROTARY = {
    "llama": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "qwen3": {"rope_type": "yarn", "factor": 4.0},
    "gpt_neox": {"rope_type": "dynamic", "factor": 2.0},
    # Switches to its long factors beyond the original positions.
    "phi3": {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [1.5, 2.0, 3.0, 4.0]},
}


@pytest.mark.parametrize("name", ROTARY)
@torch.no_grad()
def test_stretched_rotary_embeddings_are_those_of_the_whole_model(name, tmp_path):
    rope = {"rope_theta": 10000.0, "original_max_position_embeddings": 6, "partial_rotary_factor": 1.0} | ROTARY[name]
    folder = save_model(name, tmp_path, rope_parameters=rope, original_max_position_embeddings=6)
    batch = make_batch("right")

    logits, _ = run_chain(build_chain(folder, 3, attention=None), batch)

    assert torch.equal(logits, load_whole(folder)(**batch.model_inputs).logits)


def test_every_family_has_a_tiny_model():
    assert {model_type for model_type, _ in (CONFIGS | ENCODERS | ENCODER_DECODERS).values()} == FAMILIES.keys()


@pytest.mark.parametrize("name", ["bloom", "falcon_alibi"])
def test_packed_rows_of_a_model_with_alibi_are_refused(folders, name):
    with pytest.raises(ModelError, match=r"cannot be packed .* send one sequence a row"):
        run_chain(frozen_chain(folders[name], 1, attention=None), make_batch("packed"))


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_decoding_with_caches_gives_the_tokens_and_logits_of_generate(folders, name):
    prompt, new_tokens = make_batch("left"), 4
    expected = load_whole(folders[name]).generate(
        prompt.input_ids,
        attention_mask=prompt.attention_mask,
        max_new_tokens=new_tokens,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )
    stages = frozen_chain(folders[name], 3, attention=None)
    caches = [stage.new_cache() for stage in stages]

    batch, tokens = prompt, prompt.input_ids
    for step in range(new_tokens):
        logits, _ = run_chain(stages, batch, caches)
        torch.testing.assert_close(logits[:, -1], expected.logits[step], rtol=0, atol=1e-5)
        new = logits[:, -1:].argmax(-1)
        tokens = torch.cat([tokens, new], dim=1)
        mask = torch.cat([batch.attention_mask, torch.ones(2, 1, dtype=torch.long)], dim=1)
        past = mask.shape[1] - 1
        batch = Batch(new, mask, None, make_position_ids(stages[0].family, mask, None, (2, 1), past))

    assert torch.equal(tokens, expected.sequences)


@pytest.mark.parametrize("name", CONFIGS)
def test_adapter_trained_in_three_stages_equals_that_of_one_and_loads_with_stock_peft(folders, name, tmp_path):
    spec = make_spec(folders[name], rank=2, target_modules="all-linear")
    batches = make_batches(num_steps=2, num_micro_batches=3)
    states = {}
    for num_stages in (1, 3):
        with pipeline_of(spec, stages_of(num_stages)) as pipeline:
            decisions = train(pipeline, batches)
            states[num_stages] = (decisions, pipeline.state(), pipeline.executors)
    (one, state, executors), (three, other_state, _) = states[1], states[3]

    assert one == three
    assert_same_tensors(state, other_state)

    method = next(iter(executors.values())).method
    (tmp_path / "adapter_config.json").write_text(json.dumps(method.peft_config()))
    save_file(state, tmp_path / "adapter_model.safetensors")
    loaded = peft.PeftModel.from_pretrained(load_whole(folders[name]), str(tmp_path)).eval()
    batch = make_batch("right")
    with torch.no_grad():
        logits, _ = run_chain([next(iter(executors.values())).stage], batch)
        assert torch.equal(logits, loaded(**batch.model_inputs).logits)
        with loaded.disable_adapter():
            assert not torch.equal(logits, loaded(**batch.model_inputs).logits)


@pytest.mark.parametrize("name", CONFIGS)
def test_predicted_weight_bytes_are_those_of_each_stage(folders, name):
    table = describe_folder(folders[name])
    shape = JobShape(
        dtype="fp32",
        batch_rows=2,
        micro_batch_rows=2,
        row_tokens=9,
        label_tokens=4,
        **adapter_params_of(table, LoraConfig(rank=2)).shape_fields,
    )
    for num_stages in (1, 3):
        for index, stage in enumerate(frozen_chain(folders[name], num_stages, attention=None)):
            start, end = CUTS[num_stages][index : index + 2]
            bill = stage_memory(
                table,
                shape,
                start_block=start,
                end_block=end,
                num_stages=num_stages,
                stage_index=index,
                checkpointing=False,
            )
            weights = next(item.bytes for item in bill if item.name == "weights")
            assert weights == sum(parameter.nbytes for parameter in stage.model.parameters())


@pytest.mark.parametrize("name", CONFIGS)
def test_planner_and_stage_name_the_same_linears_and_never_a_router(folders, name):
    table = describe_folder(folders[name])
    stage = frozen_chain(folders[name], 1, attention=None)[0]
    prefix = stage.family.block_prefix

    planned = {f"{prefix}{block}.{linear.name}" for block in range(NUM_BLOCKS) for linear in table.block_linears[block]}

    assert planned == set(stage.block_linears)
    assert not any(linear.endswith(("mlp.gate", "router")) for linear in planned)
    shapes = {linear: stage.model.get_submodule(linear).weight.shape for linear in planned}
    assert all(len(shape) == 2 for shape in shapes.values())


@pytest.mark.parametrize("target", ["gate", "gate_up_proj", "experts", "down_proj"])
def test_experts_and_their_router_are_refused_as_targets_with_the_reason(folders, target):
    stage = build_stage(LocalSource(folders["qwen3_moe"]), 0, 1, dtype=torch.float32)
    method = LoraConfig(rank=2, target_modules=("q_proj", target))

    with pytest.raises(ConfigError, match=rf"{target}.*(router|experts).*this model has k_proj, o_proj"):
        attach_lora(stage, method, seed=0)
    with pytest.raises(ConfigError, match=rf"{target}.*(router|experts).*blocks have k_proj, o_proj"):
        adapter_params_of(describe_folder(folders["qwen3_moe"]), method)


@pytest.mark.parametrize("name", ["gemma2", "granite", "opt_projected", "gpt2"])
@torch.no_grad()
def test_head_on_chosen_positions_is_the_models_own(folders, name):
    stage = frozen_chain(folders[name], 1, attention=None)[0]
    hidden = torch.randn(5, stage.model.get_output_embeddings().weight.shape[1])

    logits = stage.head(hidden)

    plain = stage.model.get_output_embeddings()(hidden)
    expected = {"gemma2": lambda x: 3.0 * torch.tanh(x / 3.0), "granite": lambda x: x / 8.0}.get(name, lambda x: x)
    torch.testing.assert_close(logits, expected(plain), rtol=1e-6, atol=1e-6)
    assert torch.equal(stage.head(hidden[None])[0], logits)


@pytest.mark.parametrize(
    "name", sampled(["gemma2", "gemma3_text", "qwen3_moe", "bloom", "opt_projected", "phi3"], 2, always=("qwen3_moe",))
)
def test_device_measures_a_block_of_the_family(folders, name):
    request = ProfileRequest(
        config_json=(folders[name] / "config.json").read_text(),
        dtype="fp32",
        micro_batch_rows=1,
        row_tokens=4,
        label_tokens=1,
        method=LoraConfig(rank=2),
        threads=1,
        recomputes=True,
    )
    timings = measure(request)
    assert timings.forward_s > 0 and timings.head_forward_s > 0
    assert timings.recomputed_backward_s is not None and timings.recomputed_backward_s > 0
    assert timings.decoder_forward_s is None, "it has no halves"
    assert timings.mapped == timings, "nothing this small has a mapping of its own"


def test_device_measures_blocks_of_large_tensors_with_and_without_a_kept_heap(folders):
    config = json.loads((folders["phi3"] / "config.json").read_text())
    tokens = SMALLEST_MAPPING_BYTES // (4 * config["hidden_size"])
    request = ProfileRequest(
        config_json=json.dumps(config),
        dtype="fp32",
        micro_batch_rows=8,
        row_tokens=tokens // 8,
        label_tokens=1,
        method=LoraConfig(rank=2),
        threads=1,
        recomputes=True,
        is_tight=True,
    )
    timings = measure(request, least_s=0.0)
    assert timings.mapped_forward_s and timings.mapped_backward_s and timings.mapped_recomputed_backward_s
    assert timings.mapped.recomputed_backward_s == timings.mapped_recomputed_backward_s
    assert timings.mapped.head_forward_s == timings.head_forward_s


@torch.no_grad()
def test_embedding_trained_in_full_keeps_gemmas_scale(folders):
    stage = build_chain(folders["gemma3_text"], 1, attention=None)
    before, _ = run_chain(stage, make_batch("full"))

    attach_lora(stage[0], LoraConfig(rank=2, modules_to_save=("embed_tokens",)), seed=0)

    assert torch.equal(run_chain(stage, make_batch("full"))[0], before)
