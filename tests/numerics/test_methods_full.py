"""Full fine-tuning against a plain transformers loop on the unsplit model, and the export of whole models."""

from __future__ import annotations

import hashlib
import tracemalloc

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from coordinator.artifacts.assemble_model import assemble_model
from coordinator.artifacts.parts import AssembleRequest
from coordinator.artifacts.verify_process import Probe, ProbeRows, VerifyReport
from edge_node.methods.full import attach_full
from edge_node.transport.base import Peer
from partitioner.adapter import adapter_params_of
from partitioner.memory import stage_memory
from plutino.errors import ConfigError, ExportError
from plutino.families import family_of
from plutino.job.method import FullConfig
from plutino.job.model import Packing
from plutino.job.spec import parse_spec
from plutino.manifest import base_model_hash
from plutino.safetensors_index import read_safetensors_headers
from tests.numerics.chain import build_chain, make_batch, run_chain
from tests.numerics.pipelines import (
    assert_same_tensors,
    decide_step,
    make_batches,
    make_spec,
    padded,
    pipeline_of,
    stages_of,
    train,
)
from tests.numerics.test_family_memory import TINY_TOKENS, describe, job_shape, kept_ratio
from tests.numerics.test_methods import export
from tests.numerics.tiny_families import CONFIGS as FAMILY_CONFIGS
from tests.numerics.tiny_families import describe_folder, make_config, save_model
from tests.sampling import sampled

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

FULL = FullConfig()
TRAINABLE = sorted(name for name, (family, _) in FAMILY_CONFIGS.items() if not family_of(family).merged)
NUM_STEPS = 20


def spec_of(model_dir):
    training = {"steps": NUM_STEPS, "lr": 1e-3, "lr_schedule": "constant", "weight_decay": 0.01}
    return make_spec(model_dir, training=training).model_copy(update={"method": FULL})


def stock_losses(model_dir, batches):
    """As a person would write it: losses, and the first step's gradients by transformers' names."""
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01)
    losses, first_gradients = [], {}
    for batch in batches:
        total = 0.0
        for ids, labels, mask in map(padded, batch.rows):
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
            loss = cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
            (loss / batch.loss_weight).backward()
            total += loss.item()
        losses.append(total / batch.loss_weight)
        first_gradients = first_gradients or {name: p.grad.clone() for name, p in model.named_parameters()}
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return losses, first_gradients


@pytest.mark.parametrize("model", [pytest.param("tied_llama", marks=pytest.mark.slow), "gpt2"])
def test_tied_model_in_three_stages_equals_one_process_of_transformers_over_20_steps(model_dirs, model):
    batches = [batch for _ in range(NUM_STEPS // 4) for batch in make_batches(4)]
    losses, gradients = [], {}
    spec = spec_of(model_dirs[model])
    with pipeline_of(spec, stages_of(3)) as pipeline:
        # The table that both ends hold is one parameter: its gradient is counted once, and both apply it.
        embedding = pipeline.executors[Peer(0)].stage.family.embedding[0]
        for step, batch in enumerate(batches):
            outcomes = pipeline.train_step(step, batch.rows, batch.loss_weight)
            if not gradients:
                gradients = {n: g.clone() for e in pipeline.executors.values() for n, g in e._gradients.items()}
            losses.append(outcomes[Peer(2)].loss_sum / batch.loss_weight)
            pipeline.commit(step, decide_step(pipeline, step, batch.loss_weight, outcomes, 1.0).clip_scale)
        ends = [pipeline.executors[Peer(stage)].method.state()[embedding] for stage in (0, 2)]
    expected, expected_gradients = stock_losses(model_dirs[model], batches)

    assert torch.equal(*ends)
    assert max(abs(a - b) for a, b in zip(losses, expected, strict=True)) < 1e-5
    assert losses[-1] < losses[3]
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in gradients.items():
        scale = max(1.0, float(expected_gradients[name].abs().max()))
        torch.testing.assert_close(gradient, expected_gradients[name], rtol=1e-5, atol=1e-5 * scale)


@pytest.mark.parametrize("name", sampled(TRAINABLE, 2, always=("gemma2", "bloom")))
def test_every_family_gives_the_gradients_of_the_unsplit_model(name, tmp_path):
    folder = save_model(name, tmp_path)
    batch = make_batch("right", family=FAMILY_CONFIGS[name][0])
    own = batch.attention_mask.bool()
    stages = build_chain(folder, 2, attention=None)
    methods = [attach_full(stage, FULL, seed=0) for stage in stages]
    logits, finish = run_chain(stages, batch)
    logits[own].square().mean().backward()
    finish()
    found: dict[str, torch.Tensor] = {}
    for parameter in (parameter for method in methods for parameter in method.parameters):
        for _, use in parameter.uses:
            found[parameter.name] = found.get(parameter.name, 0) + use.grad
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation=stages[0].attention)
    model.eval()(**batch.model_inputs).logits[own].square().mean().backward()

    expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        scale = max(1.0, float(expected[name].abs().max()))
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-5 * scale)


def test_first_step_starts_from_the_base_model_and_there_is_no_way_back(model_dirs):
    rows = make_batches()[0].rows
    with pipeline_of(make_spec(model_dirs["llama"]), stages_of(2)) as pipeline:
        base = pipeline.evaluate(0, rows)
    with pipeline_of(spec_of(model_dirs["llama"]), stages_of(2)) as pipeline:
        assert pipeline.evaluate(0, rows) == base
        with pytest.raises(ConfigError, match="trains the base model in place"):
            pipeline.executors[Peer(0)].method.set_enabled(False)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {"path": "m", "quantization": "nf4"}}, "would pack"),
        ({"model": {"path": "m", "quantize_head": "int8"}}, "would pack"),
        ({"objective": {"type": "dpo"}}, "compares with the base model"),
        ({"training": {"init_adapter": "a"}}, "set model.path to the model that it published"),
    ],
)
def test_what_full_cannot_do_is_refused_before_a_device_is_asked(tmp_path, changes, message):
    values = {"model": "m", "data": {"train": "t"}, "method": {"type": "full"}}
    parse_spec(values, base_dir=tmp_path)
    with pytest.raises(ConfigError, match=message):
        parse_spec(values | changes, base_dir=tmp_path)


def test_packed_and_expert_weights_are_refused_on_the_device(model_dirs, tmp_path):
    (stage,) = build_chain(model_dirs["llama"], 1, packing=Packing(scheme="int8"))
    with pytest.raises(ConfigError, match="trains whole weights"):
        attach_full(stage, FULL, seed=0)
    (stage,) = build_chain(save_model("qwen3_moe", tmp_path), 1)
    with pytest.raises(ConfigError, match="experts"):
        attach_full(stage, FULL, seed=0)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_saved_bytes_of_a_block_stay_below_the_planners_and_near(family, dtype):
    # In bf16 norms keep half of what is counted.
    loosest = 1.05 if dtype == "fp32" else 1.25
    assert 1.0 <= kept_ratio(make_config(family).to_dict(), dtype, TINY_TOKENS, FULL) <= loosest


def bf16_pipeline(spec, num_stages):
    return pipeline_of(spec, stages_of(num_stages), dtype=torch.bfloat16)


@pytest.mark.parametrize("model", ["tied_llama", pytest.param("gpt2", marks=pytest.mark.slow)])
def test_bf16_weights_with_fp32_masters_give_the_same_bits_in_every_partition_and_near_fp32_losses(model_dirs, model):
    batches = make_batches(4)
    spec = spec_of(model_dirs[model])
    found = []
    for num_stages in (1, 3):
        with bf16_pipeline(spec, num_stages) as pipeline:
            decisions = train(pipeline, batches)
            found.append((decisions, pipeline.state()))
            for executor in pipeline.executors.values():
                for parameter in executor.method.parameters:
                    assert parameter.copies
                    assert all(torch.equal(copy, parameter.uses[0][1].bfloat16()) for copy in parameter.copies)
    with pipeline_of(spec, stages_of(1)) as pipeline:
        exact = train(pipeline, batches)

    assert found[0][0] == found[1][0]
    assert_same_tensors(found[0][1], found[1][1])
    assert {value.dtype for value in found[0][1].values()} == {torch.float32}
    # bf16 keeps 8 bits: a product is off by 2^-9 of its size, a loss of some products by less than 1 %.
    assert [d.loss for d in found[0][0]] == pytest.approx([d.loss for d in exact], rel=1e-2)


def test_updates_too_small_for_bf16_add_up_in_the_masters(model_dirs):
    small = {"steps": NUM_STEPS, "lr": 1e-6, "lr_schedule": "constant"}
    spec = make_spec(model_dirs["llama"], training=small).model_copy(update={"method": FULL})
    batches = [batch for _ in range(2) for batch in make_batches(4)]
    name = "model.layers.1.mlp.up_proj.weight"
    with bf16_pipeline(spec, 2) as pipeline:
        start = pipeline.state()[name]
        train(pipeline, batches[:1])
        first = pipeline.state()[name]
        train(pipeline, batches[1:], first_step=1)
        last = pipeline.state()[name]

    is_lost = first.bfloat16() == start.bfloat16()
    assert is_lost.float().mean() > 0.95, "most single updates are below half of bf16's step"
    assert float((last - start).abs().median()) > 3 * float((first - start).abs().median())


def test_snapshot_of_bf16_training_goes_on_with_the_same_bits_in_another_partition(model_dirs):
    spec, batches = spec_of(model_dirs["tied_llama"]), make_batches(4)
    with bf16_pipeline(spec, 1) as pipeline:
        whole = train(pipeline, batches), pipeline.state()
    with bf16_pipeline(spec, 3) as pipeline:
        first = train(pipeline, batches[:2])
        snapshot = pipeline.snapshot()
    with bf16_pipeline(spec, 2) as pipeline:
        pipeline.restore(snapshot)
        assert first + train(pipeline, batches[2:], first_step=2) == whole[0]
        assert_same_tensors(pipeline.state(), whole[1])


def test_model_trained_in_bf16_is_published_in_fp32_and_has_the_pipelines_loss_in_bf16(model_dirs, tmp_path):
    spec, batch = spec_of(model_dirs["tied_llama"]), make_batches()[0]
    with bf16_pipeline(spec, 2) as pipeline:
        train(pipeline, make_batches())
        probe = Probe(
            micro_batches=tuple(map(ProbeRows.of, batch.rows)),
            loss_sum=pipeline.evaluate(0, batch.rows),
            num_counted=int(batch.loss_weight),
            dtype="bf16",
        )
        assembled, published = export(pipeline, spec, tmp_path / "out", probe)

    assert assembled.was_reloaded
    assert {tensor.dtype for tensor in published.values()} == {torch.float32}


def test_bill_of_bf16_has_a_master_beside_each_weight():
    table = describe(make_config("llama").to_dict())
    shape = job_shape(table, "bf16", TINY_TOKENS, FULL)
    items = stage_memory(table, shape, start_block=1, end_block=2, num_stages=3, stage_index=1, checkpointing=False)
    bill = {item.name: item.bytes for item in items}
    assert bill["weights"] == 2 * table.block_params[1]
    assert bill["adapter and optimiser"] == 16 * table.block_params[1]


@pytest.mark.parametrize("model", ["llama", "tied_llama", "gpt2"])
def test_trained_parameters_are_the_models_own_with_a_tied_embedding_counted_once(model_dirs, model):
    whole = AutoModelForCausalLM.from_pretrained(model_dirs[model])

    assert adapter_params_of(describe_folder(model_dirs[model]), FULL).num_params == whole.num_parameters()


def test_bill_has_the_weight_once_and_gradient_and_moments_beside_it():
    table = describe(make_config("llama").to_dict())
    shape = job_shape(table, "fp32", TINY_TOKENS, FULL)
    items = stage_memory(table, shape, start_block=1, end_block=2, num_stages=3, stage_index=1, checkpointing=False)
    bill = {item.name: item.bytes for item in items}
    assert "trained parameters in fp32" in next(item.why for item in items if item.name == "weights")
    assert bill["weights"] == 4 * table.block_params[1]
    assert bill["adapter and optimiser"] == 12 * table.block_params[1]
    assert bill["shadow snapshot"] == 12 * table.block_params[1]


class DiskBulk:
    """The bulk process as a folder: every answer is a copy in memory of its own."""

    def __init__(self, folder):
        self.folder = folder

    def get_shadow(self, job_id, shadow_id, sha256):
        return bytearray((self.folder / shadow_id).read_bytes())

    def put_shadow(self, job_id, shadow_id, data, sha256):
        raise AssertionError("a whole model is never uploaded")


def staged_request(model_dir, folder, parts):
    for name, tensors in parts.items():
        save_file({f"param/{key}": value for key, value in tensors.items()}, folder / name)
    return AssembleRequest(
        job_id="j1",
        step=1,
        shadows={name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in parts},
        parameter_names=tuple(sorted({key for tensors in parts.values() for key in tensors})),
        adapter_config_json="{}",
        output_dir=str(folder / "out"),
        base_hash=base_model_hash(model_dir),
    )


def test_export_holds_one_stage_in_memory_and_writes_shards_of_bounded_size(model_dirs, tmp_path):
    part_bytes, num_parts = 4 << 20, 6
    parts = {f"stage{n}": {f"w{n}.{i}": torch.randn(part_bytes // 16) for i in range(4)} for n in range(num_parts)}
    request = staged_request(model_dirs["llama"], tmp_path, parts)
    tracemalloc.start()
    assembled = assemble_model(
        request,
        spec_of(model_dirs["llama"]),
        DiskBulk(tmp_path),
        verify=lambda _: VerifyReport(),
        max_shard_bytes=part_bytes // 2,
    )
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()

    # The answer, what the test's own bulk reads beside it, and the part before, which a loop lets go of too late.
    assert peak_bytes < 3.5 * part_bytes < num_parts * part_bytes
    assert len(assembled.model_files) == 2 * num_parts
    folder = tmp_path / ".plutino-j1-staging"
    assert {name: entry.file for name, entry in read_safetensors_headers(folder).items()}.keys() == {
        name for tensors in parts.values() for name in tensors
    }
    found = {name: tensor for file in assembled.model_files for name, tensor in load_file(folder / file).items()}
    assert all(torch.equal(found[name], value) for tensors in parts.values() for name, value in tensors.items())


def test_export_refuses_holders_that_differ_missing_parts_and_what_is_not_finite(model_dirs, tmp_path):
    def assemble(request):
        return assemble_model(
            request, spec_of(model_dirs["llama"]), DiskBulk(tmp_path), verify=lambda _: VerifyReport()
        )

    table = torch.ones(3)
    request = staged_request(model_dirs["llama"], tmp_path, {"stage0": {"e": table}, "stage1": {"e": table + 1}})
    with pytest.raises(ExportError, match="drifted apart"):
        assemble(request)
    request = staged_request(model_dirs["llama"], tmp_path, {"stage0": {"e": table / 0}})
    with pytest.raises(ExportError, match="not finite"):
        assemble(request)
    request = staged_request(model_dirs["llama"], tmp_path, {"stage0": {"e": table}})
    with pytest.raises(ExportError, match="lack 1 of 2 parameters"):
        assemble(request.model_copy(update={"parameter_names": ("e", "f")}))
    assert not (tmp_path / ".plutino-j1-staging").exists()
