"""Full fine-tuning and bottleneck adapters of encoder-decoders split over stages, against transformers itself."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from coordinator.artifacts.verify import import_ahead
from coordinator.artifacts.verify_process import Probe, ProbeRows
from edge_node import profile
from edge_node.engine.freezing import block_of_use
from edge_node.engine.generate import GenerateOptions
from edge_node.stage.stage import Stage
from edge_node.stage.verify import part_difference
from edge_node.transport.base import Peer
from partitioner.adapter import adapter_params_of
from partitioner.device import ProfileRequest
from partitioner.memory import stage_memory
from partitioner.shape import JobShape
from plutino.families import family_of
from plutino.job.method import AdaptersConfig, FullConfig, LoraConfig, ParallelAdaptersConfig
from plutino.job.method_part import Unfreezing
from plutino.job.objective import Seq2SeqConfig
from plutino.load_adapter import load_adapter
from tests.numerics.pipelines import (
    assert_same_tensors,
    decide_step,
    make_batches,
    make_spec,
    pipeline_of,
    stages_of,
    train,
)
from tests.numerics.test_encoder_decoders import stock_model, two_texts
from tests.numerics.test_methods import counted, export
from tests.numerics.test_methods_adapters import by_formula, moved
from tests.numerics.tiny_families import ENCODER_DECODERS, describe_folder, make_config, save_model
from tests.sampling import sampled

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

FULL = FullConfig()
HOULSBY = AdaptersConfig(bottleneck=5, placement="houlsby")
NUM_STEPS = 20
# T5 1.1 as it is published; one whose checkpoint holds what nobody trains.
MODELS = (*ENCODER_DECODERS, "t5_own_head", "bart_biased")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    found = {name: save_model(name, tmp_path_factory.mktemp(name)) for name in ENCODER_DECODERS}
    generator = torch.Generator().manual_seed(4)
    more = {"lm_head.weight": torch.randn(61, 32, generator=generator)}
    found["t5_own_head"] = changed(
        found["t5_gated"], tmp_path_factory.mktemp("t5_own_head"), more, tie_word_embeddings=False
    )
    more = {"final_logits_bias": torch.linspace(-1, 1, 61)[None]}
    found["bart_biased"] = changed(found["bart"], tmp_path_factory.mktemp("bart_biased"), more)
    return found


def changed(base, folder, more, **settings):
    """A saved model with further tensors and other settings."""
    values = json.loads((base / "config.json").read_text()) | settings
    (folder / "config.json").write_text(json.dumps(values))
    save_file(load_file(base / "model.safetensors") | more, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def spec_of(folder, method):
    training = {"steps": NUM_STEPS, "lr": 1e-3, "lr_schedule": "constant", "weight_decay": 0.01}
    return make_spec(folder, training=training).model_copy(update={"objective": Seq2SeqConfig(), "method": method})


def loss_of(model, rows):
    inputs = two_texts(rows, model.config)
    labels = inputs["labels"]
    logits = model(**inputs, use_cache=False).logits
    return cross_entropy(logits[labels != -100].float(), labels[labels != -100], reduction="sum")


def stock_losses(model, batches):
    """As a person would train all of a model: losses, and the first step's gradients by transformers' names."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01)
    losses, first_gradients = [], {}
    for batch in batches:
        total = 0.0
        for rows in batch.rows:
            loss = loss_of(model, rows)
            (loss / batch.loss_weight).backward()
            total += float(loss.detach())
        losses.append(total / batch.loss_weight)
        first_gradients = first_gradients or {name: p.grad.clone() for name, p in model.named_parameters()}
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return losses, first_gradients


def gradients_of(pipeline):
    return {name: g.clone() for e in pipeline.executors.values() for name, g in e._gradients.items()}


def assert_close_gradients(found, expected):
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        scale = max(1.0, float(expected[name].abs().max()))
        torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=1e-5 * scale)
        assert gradient.abs().max() > 0


# A table between the stages in any number of them: one, and one to each block.
CASES = [(name, num) for name in MODELS for num in (3, 4)]


@pytest.mark.parametrize(("name", "num_stages"), sampled(CASES, 2, always=(("t5", 3), ("bart_biased", 3))))
def test_all_weights_in_stages_equal_one_process_of_transformers_over_20_steps(folders, name, num_stages):
    num_steps = NUM_STEPS if name == "t5" else 4
    batches = [batch for _ in range(num_steps // 4) for batch in make_batches(4, num_micro_batches=2)]
    losses, gradients, last = [], {}, Peer(num_stages - 1)
    with pipeline_of(spec_of(folders[name], FULL), stages_of(num_stages)) as pipeline:
        for step, batch in enumerate(batches):
            outcomes = pipeline.train_step(step, batch.rows, batch.loss_weight)
            gradients = gradients or gradients_of(pipeline)
            losses.append(outcomes[last].loss_sum / batch.loss_weight)
            pipeline.commit(step, decide_step(pipeline, step, batch.loss_weight, outcomes, 1.0).clip_scale)
        state = pipeline.state()
    model = AutoModelForSeq2SeqLM.from_pretrained(folders[name], dtype=torch.float32).eval()
    expected, expected_gradients = stock_losses(model, batches)

    assert max(abs(a - b) for a, b in zip(losses, expected, strict=True)) < 1e-5
    assert_close_gradients(gradients, expected_gradients)
    assert state.keys() == dict(model.named_parameters()).keys()


@pytest.mark.parametrize(
    ("name", "method"),
    sampled(
        [(name, method) for name in MODELS for method in (FULL, HOULSBY)],
        1,
        always=(("t5", FULL),),
    ),
)
def test_partition_recomputation_and_replicas_change_no_bit(folders, name, method):
    spec, batches, found = spec_of(folders[name], method), make_batches(), []
    replicated = stages_of(2, (2, 2), ((0, 1), (0, 1)))
    for stages, checkpointing in ((stages_of(1), False), (stages_of(3), True), (replicated, False)):
        with pipeline_of(spec, stages, checkpointing=checkpointing) as pipeline:
            start = pipeline.state()
            found.append((train(pipeline, batches), pipeline.state()))

    for decisions, state in found[1:]:
        assert decisions == found[0][0]
        assert_same_tensors(state, found[0][1])
    assert not [key for key, value in found[0][1].items() if torch.equal(value, start[key])]


@pytest.mark.slow
def test_bf16_weights_have_one_master_of_a_table_that_stages_share(folders):
    found = []
    for num_stages in (1, 4):
        with pipeline_of(spec_of(folders["t5"], FULL), stages_of(num_stages), dtype=torch.bfloat16) as pipeline:
            found.append((train(pipeline, make_batches()), pipeline.state()))
            for executor in pipeline.executors.values():
                for parameter in executor.method.parameters:
                    assert torch.equal(parameter.copies[0], parameter.uses[0][1].bfloat16())
    assert found[0][0] == found[1][0]
    assert_same_tensors(found[0][1], found[1][1])


@pytest.mark.parametrize(
    ("name", "blocks"),
    sampled(
        [(name, blocks) for name in ("t5", "bart") for blocks in (None, "last 1", (0, 2))],
        1,
        always=(("t5", (0, 2)),),
    ),
)
def test_adapters_give_the_formulas_loss_and_gradients_on_the_whole_model(folders, name, blocks):
    method = HOULSBY.model_copy(update={"blocks": blocks})
    (batch,) = make_batches(1)
    with pipeline_of(spec_of(folders[name], method), stages_of(3)) as pipeline:
        values = moved(pipeline.state())
        for executor in pipeline.executors.values():
            executor.method.load(values)
        outcomes = pipeline.train_step(0, batch.rows, batch.loss_weight)
        gradients = gradients_of(pipeline)
        layout = pipeline.executors[Peer(0)].method.peft_config()
    whole = AutoModelForSeq2SeqLM.from_pretrained(folders[name]).eval().requires_grad_(False)
    leaves = by_formula(whole, values, layout["layers"])
    total = 0.0
    for rows in batch.rows:
        loss = loss_of(whole, rows)
        (loss / batch.loss_weight).backward()
        total += float(loss.detach())

    assert outcomes[Peer(2)].loss_sum == pytest.approx(total, rel=1e-6)
    assert_close_gradients(gradients, {key: leaf.grad for key, leaf in leaves.items()})
    # Behind a decoder's second attention too.
    num_layers = {None: 2 * 2 + 2 * 3, "last 1": 3, (0, 2): 2 + 3}[blocks]
    assert (len(layout["layers"]), layout["task_type"]) == (num_layers, "SEQ_2_SEQ_LM")


@pytest.mark.parametrize(("name", "blocks"), [("t5", (0, 3)), pytest.param("bart", "last 1", marks=pytest.mark.slow)])
def test_lora_in_blocks_counted_through_is_what_stock_peft_adapts_bit_for_bit(folders, name, blocks):
    method = LoraConfig(rank=2, target_modules="all-linear", blocks=blocks)
    rows = make_batches(1)[0].rows[0]
    with pipeline_of(spec_of(folders[name], method), stages_of(3)) as pipeline:
        values = moved(pipeline.state())
        for executor in pipeline.executors.values():
            executor.method.load(values)
        outcomes = pipeline.train_step(0, [rows], 4.0)
        gradients, saved = gradients_of(pipeline), pipeline.executors[Peer(0)].method.peft_config()
    stock = stock_model(folders[name], saved)
    peft.set_peft_model_state_dict(stock, values)
    loss = loss_of(stock, rows)
    (loss / 4.0).backward()

    assert outcomes[Peer(2)].loss_sum == float(loss.detach())
    whole = {key.replace(".default", ""): p.grad for key, p in stock.named_parameters() if p.requires_grad}
    assert_same_tensors(gradients, whole)
    table = adapter_params_of(describe_folder(folders[name]), method)
    assert table.num_params == sum(value.numel() for value in values.values())


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("t5_own_head", FULL),
        ("bart_biased", FULL),
        pytest.param("t5", HOULSBY, marks=pytest.mark.slow),
        pytest.param("t5", FULL, marks=pytest.mark.slow),
    ],
)
def test_what_is_published_loads_in_transformers_with_the_pipelines_loss(folders, tmp_path, name, method):
    spec, rows = spec_of(folders[name], method), make_batches()[0].rows
    with pipeline_of(spec, stages_of(3)) as pipeline:
        train(pipeline, make_batches())
        probe = Probe(
            micro_batches=tuple(map(ProbeRows.of, rows)),
            loss_sum=pipeline.evaluate(0, rows),
            num_counted=int(sum(each.label_mask.sum() for each in rows)),
            objective=spec.objective,
            dtype="fp32",
        )
        sources = replace(rows[0], label_mask=rows[0].label_mask * 0)
        (answers,) = pipeline.generate(1, [sources], GenerateOptions(max_new_tokens=4, stop_tokens=()))
        assembled, published = export(pipeline, spec, tmp_path / "out", probe)
        if method is HOULSBY:
            differences = [part_difference(e.stage, e.method, published) for e in pipeline.executors.values()]
            assert differences == [0.0, 0.0, 0.0]

    assert assembled.was_reloaded
    staged = assembled.staging_dir
    model = AutoModelForSeq2SeqLM.from_pretrained(folders[name] if method is HOULSBY else staged).eval()
    if method is HOULSBY:
        load_adapter(model, staged)
    with torch.no_grad():
        assert sum(float(loss_of(model, each)) for each in rows) == pytest.approx(probe.loss_sum, rel=1e-6)
        asked = two_texts(sources, model.config)
        asked.pop("labels")
        # No token ends an answer early.
        found = model.generate(**asked, max_new_tokens=4, min_new_tokens=4, do_sample=False, num_beams=1)
    assert answers == [row[1:] for row in found.tolist()]


@pytest.mark.parametrize("name", sampled(list(MODELS), 2, always=("t5_own_head", "bart_biased")))
def test_planner_knows_the_trained_parameters_and_weights_of_every_stage(folders, name):
    table, whole = describe_folder(folders[name]), AutoModelForSeq2SeqLM.from_pretrained(folders[name])
    assert adapter_params_of(table, FULL).num_params == whole.num_parameters()
    for method in (FULL, HOULSBY):
        adapter = adapter_params_of(table, method)
        with pipeline_of(spec_of(folders[name], method), stages_of(4)) as pipeline:
            found = {me.stage_index: counted(executor.method) for me, executor in pipeline.executors.items()}
        expected = {stage: block.params for stage, block in enumerate(adapter.blocks)}
        expected[0] += adapter.first_params
        expected[3] += adapter.last_params
        # Each of these stages has blocks of one half, whose table it holds.
        assert found == {stage: number + adapter.stage_params // 2 for stage, number in expected.items()}


def test_bill_of_all_weights_has_no_weight_twice(folders):
    table = describe_folder(folders["t5"])
    shape = JobShape(
        dtype="fp32",
        batch_rows=2,
        micro_batch_rows=2,
        row_tokens=9,
        label_tokens=4,
        **adapter_params_of(table, FULL).shape_fields,
    )
    for index, (start, end) in enumerate(pairwise((0, 1, 3, 4))):
        place = {"num_stages": 3, "stage_index": index, "checkpointing": False}
        bill = {one.name: one.bytes for one in stage_memory(table, shape, start_block=start, end_block=end, **place)}
        # Both halves' tables are counted on each stage.
        assert 0 <= bill["adapter and optimiser"] - 3 * bill["weights"] <= 12 * table.repeated_params


@pytest.mark.parametrize(
    ("name", "role", "block"),
    [
        ("shared.weight", "embedding", 0),
        ("base_model.model.encoder.block.1.layer.0.SelfAttention.q.lora_A.weight", "block", 1),
        ("base_model.model.decoder.block.1.layer.0.SelfAttention.q.lora_A.weight", "block", 3),
        ("encoder.final_layer_norm.weight", "block", 1),
        ("decoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight", "block 3", 3),
        ("decoder.final_layer_norm.weight", "block", None),
    ],
)
def test_blocks_of_both_halves_are_unfrozen_in_their_order(name, role, block):
    assert block_of_use(name, role, family_of("t5"), 2) == block


def test_verification_imports_ahead_a_family_that_has_no_causal_model(folders):
    with pytest.raises(ValueError, match="Unrecognized configuration class"):
        AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folders["t5"]))

    import_ahead(folders["t5"])


@pytest.mark.parametrize("method", [FULL, pytest.param(HOULSBY, marks=pytest.mark.slow)])
def test_top_down_unfreezing_leaves_lower_blocks_alone_in_every_partition(folders, method):
    method = method.model_copy(update={"unfreeze": Unfreezing(every_steps=2)})
    found = []
    for num_stages in (1, 3):
        with pipeline_of(spec_of(folders["t5"], method), stages_of(num_stages)) as pipeline:
            start = pipeline.state()
            found.append((train(pipeline, make_batches()), pipeline.state()))

    assert found[0][0] == found[1][0]
    assert_same_tensors(found[0][1], found[1][1])
    moved_names = {name for name, value in found[0][1].items() if not torch.equal(value, start[name])}
    assert any("decoder.block.1." in name for name in moved_names)
    assert not any("encoder.block." in name or "decoder.block.0.layer.2" in name for name in moved_names)


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("t5", FULL),
        ("t5", ParallelAdaptersConfig(reduction=2)),
        pytest.param("bart", ParallelAdaptersConfig(reduction=2), marks=pytest.mark.slow),
        pytest.param("bart", HOULSBY, marks=pytest.mark.slow),
    ],
)
def test_a_block_of_either_half_is_measured_beside_texts_of_their_own_lengths(name, method, monkeypatch):
    monkeypatch.setattr(profile, "SMALLEST_MAPPING_BYTES", 1)
    request = ProfileRequest(
        config_json=json.dumps(make_config(name).to_dict()),
        dtype="fp32",
        micro_batch_rows=2,
        row_tokens=9,
        source_tokens=7,
        label_tokens=6,
        method=method.for_profile(),
        threads=1,
        recomputes=True,
        is_tight=True,
        scales=True,
    )
    seen, run = set(), Stage.run

    def watched(stage, inputs):
        seen.add((stage.has_decoder_blocks, stage.is_last, inputs.source.shape[:2], inputs.hidden.shape[:2]))
        return run(stage, inputs)

    monkeypatch.setattr(Stage, "run", watched)
    timings = profile.measure(request, least_s=0.0)

    rows = {((2, 7), (2, 3)), ((1, 7), (1, 3))}
    assert seen == {(has_decoder_blocks, False, *shapes) for has_decoder_blocks in (False, True) for shapes in rows}
    known_s = timings.known_s
    passes = ["forward_s", "backward_s"]
    # Nothing of a side network is recomputed.
    passes += [] if isinstance(method, ParallelAdaptersConfig) else ["recomputed_backward_s"]
    names = {f"{mapped}{half}{each}" for mapped in ("", "mapped_") for half in ("", "decoder_") for each in passes}
    assert set(known_s) == names | {"embedding_s", "head_forward_s", "head_backward_s"}
    of_one_row = {f"{part}{way}_s" for part in ("", "decoder_", "head_") for way in ("forward", "backward")}
    assert set(timings.one_row_s) == of_one_row
    assert all(seconds > 0 for seconds in timings.all_s.values())
