"""Prefix tuning and P-tuning v2 against stock peft on the unsplit model: outputs, first gradients, generation."""

from __future__ import annotations

import json

import peft
import pytest
import torch
from safetensors.numpy import save_file as save_arrays
from torch.nn import functional
from transformers import AutoModelForCausalLM

from edge_node.engine.generate import GenerateOptions
from edge_node.methods.prefix import attach_prefix
from edge_node.stage.passes import StageInput
from edge_node.transport.base import Peer
from partitioner.adapter import adapter_params_of
from plutino.errors import ConfigError, ModelError
from plutino.families import FAMILIES
from plutino.job.method import PrefixConfig, PTuningV2Config
from plutino.job.model import Packing
from plutino.job.spec import parse_spec
from tests.numerics.chain import build_chain, make_batch, run_chain
from tests.numerics.pipelines import (
    assert_same_tensors,
    make_batches,
    make_rows,
    make_spec,
    padded,
    pipeline_of,
    stages_of,
    train,
)
from tests.numerics.tiny_families import CONFIGS as FAMILY_CONFIGS
from tests.numerics.tiny_families import describe_folder, save_model
from tests.sampling import sampled

pytestmark = [
    pytest.mark.filterwarnings("ignore:Position ids are not supported for parameter efficient tuning:UserWarning"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]

PLAIN = PrefixConfig(num_virtual_tokens=5)
PROJECTED = PrefixConfig(num_virtual_tokens=4, projection=True, encoder_hidden_size=7)
DEEP = PTuningV2Config(num_virtual_tokens=3)
NEW_TOKENS = 6
# The first has a sliding window of 5 tokens behind a past of 7; the others what their attention does to keys.
FAMILY_SAMPLE = ("mistral", "bloom", "falcon_alibi", "gemma3_text", "qwen3")


def spec_of(model_dir, config):
    return make_spec(model_dir).model_copy(update={"method": config})


def published(executors):
    """The checkpoint that a job would publish, in fp32 arrays."""
    method = executors[0].method
    parts = {name: value for e in executors for name, value in (e.method.derived() or e.method.state()).items()}
    config = PLAIN if "prompt_embeddings.0" in parts else PROJECTED
    return config.checkpoint_of({name: value.numpy() for name, value in parts.items()}), method.peft_config()


def stock_model(model_dir, pipeline, folder):
    """Stock peft with the pipeline's keys and values, from the files that a job publishes."""
    arrays, config = published(list(pipeline.executors.values()))
    save_arrays(arrays, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config))
    base = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    return peft.PeftModel.from_pretrained(base, str(folder)).eval()


def trainable_peft(model_dir, pipeline, config):
    """Stock peft, training, with the pipeline's values; and its parameters by our names."""
    state, saved = pipeline.state(), pipeline.executors[Peer(0)].method.peft_config()
    base = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    stock = peft.get_peft_model(base, peft.PrefixTuningConfig(**saved | {"inference_mode": False})).eval()
    encoder = stock.prompt_encoder["default"]
    blocks = range(saved["num_layers"])
    if not config.projection:
        values = {"embedding.weight": torch.cat([state[f"prompt_embeddings.{b}"] for b in blocks], dim=1)}
    else:
        values = {
            name: state[f"prefix.{name}"] for name in ("embedding.weight", "transform.0.weight", "transform.0.bias")
        }
        for key in ("weight", "bias"):
            values[f"transform.2.{key}"] = torch.cat([state[f"prefix.transform.2.{b}.{key}"] for b in blocks])
    encoder.load_state_dict(values)
    return stock, dict(encoder.named_parameters())


def gradients_by_our_names(parameters, names):
    """Gradients of peft, cut into blocks where ours are."""
    found = {}
    for name in names:
        kind, _, rest = name.partition(".")
        if kind == "prompt_embeddings":
            found[name] = parameters["embedding.weight"].grad.chunk(4, dim=1)[int(rest)]
        elif rest.startswith("transform.2."):
            block, key = rest.removeprefix("transform.2.").split(".")
            found[name] = parameters[f"transform.2.{key}"].grad.chunk(4)[int(block)]
        else:
            found[name] = parameters[rest].grad
    return found


@pytest.mark.parametrize("config", [PLAIN, PROJECTED], ids=["plain", "projected"])
@pytest.mark.parametrize("model", ["llama", "gpt2"])
def test_loss_and_first_gradients_on_padded_rows_are_those_of_stock_peft(model_dirs, model, config):
    batch = make_batches()[0]
    with pipeline_of(spec_of(model_dirs[model], config), stages_of(3)) as pipeline:
        stock, parameters = trainable_peft(model_dirs[model], pipeline, config)
        outcomes = pipeline.train_step(0, batch.rows, batch.loss_weight)
        found = {name: g.clone() for e in pipeline.executors.values() for name, g in e._gradients.items()}
    total = 0.0
    for ids, labels, mask in map(padded, batch.rows):
        logits = stock(input_ids=ids, attention_mask=mask).logits
        loss = functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
        (loss / batch.loss_weight).backward()
        total += loss.item()

    assert outcomes[Peer(2)].loss_sum == pytest.approx(total, rel=1e-5)
    assert any(length < rows.padded_tokens for rows in batch.rows for length in rows.lengths)
    expected = gradients_by_our_names(parameters, found)
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize(("model", "config"), [("llama", PROJECTED), ("gpt2", PLAIN), ("llama", DEEP)])
def test_greedy_tokens_of_left_padded_rows_are_those_of_stock_peft_on_each_row_alone(
    model_dirs, tmp_path, model, config
):
    """Alone, because peft counts positions over the padding: with it, its own rows get other tokens."""
    groups = [make_rows(100 + g, 3, num_tokens=6 + g) for g in range(2)]
    with pipeline_of(spec_of(model_dirs[model], config), stages_of(2)) as pipeline:
        train(pipeline, make_batches())
        found = pipeline.generate(0, groups, GenerateOptions(max_new_tokens=NEW_TOKENS, stop_tokens=()))
        stock = stock_model(model_dirs[model], pipeline, tmp_path)

    for rows, tokens in zip(groups, found, strict=True):
        starts = [sum(rows.lengths[:i]) for i in range(len(rows.lengths))]
        for start, length, own in zip(starts, rows.lengths, tokens, strict=True):
            ids = torch.from_numpy(rows.input_ids[start : start + length])[None].long()
            output = stock.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=NEW_TOKENS,
                do_sample=False,
                pad_token_id=0,
            )
            assert output[0, length:].tolist() == own


@pytest.mark.parametrize(
    "name", sampled(sorted(FAMILY_CONFIGS.keys() & FAMILIES.keys() | set(FAMILY_SAMPLE)), 5, always=FAMILY_SAMPLE)
)
def test_every_family_gives_stock_pefts_logits_and_gradients_with_and_without_recomputation(name, tmp_path):
    folder = save_model(name, tmp_path)
    config = PrefixConfig(num_virtual_tokens=7)
    batch = make_batch("right", family=FAMILY_CONFIGS[name][0])
    results = []
    for checkpointing in (False, True):
        stages = build_chain(folder, 2, attention=None, checkpointing=checkpointing)
        methods = [attach_prefix(stage, config, seed=1) for stage in stages]
        logits, finish = run_chain(stages, batch)
        logits[batch.attention_mask.bool()].square().mean().backward()
        finish()
        results.append((logits, {p.name: p.uses[0][1] for method in methods for p in method.parameters}))
    (logits, parameters), (again, recomputed) = results
    assert torch.equal(logits, again)
    assert_same_tensors({n: p.grad for n, p in parameters.items()}, {n: p.grad for n, p in recomputed.items()})

    attention = stages[0].attention
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation=attention)
    stock = peft.get_peft_model(
        base, peft.PrefixTuningConfig(**methods[0].peft_config() | {"inference_mode": False})
    ).eval()
    table = stock.prompt_encoder["default"].embedding.weight
    with torch.no_grad():
        table.copy_(torch.cat([parameters[f"prompt_embeddings.{block}"] for block in range(4)], dim=1))
    expected = stock(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    expected[batch.attention_mask.bool()].square().mean().backward()
    own = batch.attention_mask.bool()
    scale = float(expected[own].detach().abs().max())
    torch.testing.assert_close(logits[own], expected[own], rtol=1e-5, atol=1e-5 * max(1.0, scale))
    for block, gradient in enumerate(table.grad.chunk(4, dim=1)):
        found = parameters[f"prompt_embeddings.{block}"].grad
        torch.testing.assert_close(found, gradient, rtol=1e-4, atol=1e-5 * max(1.0, float(gradient.abs().max())))


@pytest.mark.parametrize("scheme", ["int8", "nf4"])
def test_partition_changes_no_bit_on_packed_weights(model_dirs, scheme):
    packing = Packing(scheme=scheme)
    results = []
    for num_stages in (1, 3):
        spec = spec_of(model_dirs["llama"], PROJECTED)
        with pipeline_of(spec, stages_of(num_stages), packing=packing, checkpointing=True) as pipeline:
            results.append((train(pipeline, make_batches(2)), pipeline.state()))
    assert results[0][0] == results[1][0]
    assert_same_tensors(results[0][1], results[1][1])


def test_each_stage_holds_its_own_blocks_and_all_hold_the_mlps_trunk(model_dirs):
    methods = [attach_prefix(stage, PROJECTED, seed=1) for stage in build_chain(model_dirs["llama"], 3)]

    names = [{p.name for p in method.parameters} for method in methods]
    trunk = {"prefix.embedding.weight", "prefix.transform.0.weight", "prefix.transform.0.bias"}
    assert set.intersection(*names) == trunk
    blocks = [{name.split(".")[3] for name in own - trunk} for own in names]
    assert blocks == [{"0"}, {"1", "2"}, {"3"}]


@pytest.mark.parametrize("config", [PLAIN, PROJECTED, DEEP], ids=["plain", "projected", "deep"])
def test_trainable_count_is_the_formula_and_that_of_stock_peft(model_dirs, config):
    table = describe_folder(model_dirs["llama"])
    width, blocks, tokens = 2 * 8, 4, config.num_virtual_tokens
    inner = getattr(config, "encoder_hidden_size", 0)
    is_projected = config == PROJECTED
    expected = tokens * width + width * inner + inner + blocks * 2 * width * (inner + 1) if is_projected else 0
    expected = expected or tokens * blocks * 2 * width
    settings = {"num_virtual_tokens": tokens, "prefix_projection": is_projected, "encoder_hidden_size": inner}
    base = AutoModelForCausalLM.from_pretrained(model_dirs["llama"])
    stock = peft.get_peft_model(base, peft.PrefixTuningConfig(task_type="CAUSAL_LM", **settings))

    assert adapter_params_of(table, config).num_params == expected == stock.get_nb_trainable_parameters()[0]


def test_packed_rows_and_going_on_from_a_projected_prefix_are_refused(model_dirs):
    (stage,) = build_chain(model_dirs["llama"], 1)
    attach_prefix(stage, PLAIN, seed=0)
    batch = make_batch("packed")
    with pytest.raises(ModelError, match="no place for virtual tokens"):
        stage.forward(
            StageInput(position_ids=batch.position_ids, input_ids=batch.input_ids, segment_ids=batch.segment_ids)
        )
    values = {"model": "m", "data": {"train": "t"}, "training": {"init_adapter": "a"}}
    with pytest.raises(ConfigError, match="not the MLP they came from"):
        parse_spec({**values, "method": {"type": "prefix", "projection": True}}, base_dir=model_dirs["llama"])
    parse_spec({**values, "method": {"type": "prefix"}}, base_dir=model_dirs["llama"])


def test_published_keys_and_values_stand_in_for_the_mlp_until_it_is_loaded_again(model_dirs):
    (stage,) = build_chain(model_dirs["llama"], 1)
    method = attach_prefix(stage, PROJECTED, seed=0)
    batch, live = make_batch("right"), method.state()
    derived = {name: value.numpy() for name, value in method.derived().items()}
    checkpoint = {name: torch.from_numpy(value) for name, value in PROJECTED.checkpoint_of(derived).items()}
    with torch.no_grad():
        before = run_chain([stage], batch)[0]
        method.load(checkpoint)
        assert torch.equal(run_chain([stage], batch)[0], before)
        method.load({name: value + 1 for name, value in checkpoint.items()})
        assert not torch.equal(run_chain([stage], batch)[0], before)
        method.load(live)
        assert torch.equal(run_chain([stage], batch)[0], before)
