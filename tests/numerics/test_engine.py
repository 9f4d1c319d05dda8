"""Training through all stages in one process: what a partition must never change."""

from __future__ import annotations

import math
from functools import cache

import peft
import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from coordinator.jobs.barrier import Abort, AbortKind, Commit
from edge_node.transport.base import MessageKind, Peer, UnitCancelledError
from plutino.errors import JobError, PeerLostError
from plutino.types import Unit, UnitKind
from tests.numerics.pipelines import (
    Batch,
    assert_same_tensors,
    cancel_at_call,
    make_batches,
    make_rows,
    make_spec,
    padded,
    pipeline_of,
    run_step,
    stages_of,
    train,
)
from tests.sampling import sampled

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning"),
]

TIED = {"modules_to_save": ("lm_head",), "ensure_weight_tying": True}
METHODS = {
    "plain": {},
    "dropout": {"dropout": 0.1},
    "dora_dropout": {"dropout": 0.1, "use_dora": True},
    "rank_pattern": {"rank_pattern": {r"2\..*q_proj": 2}, "alpha_pattern": {"down_proj": 5.0}},
    "tied": TIED,
    "blocks": {"blocks": "last 2"},
}


def trained(spec, stages, batches=None, **options):
    """Decisions, final parameters and moments."""
    with pipeline_of(spec, stages, **options) as pipeline:
        decisions = train(pipeline, batches or make_batches())
        return decisions, pipeline.snapshot()


@cache
def whole_run(model_dir, method, **options):
    """The unsplit run, which several tests compare with; nobody changes it."""
    return trained(make_spec(model_dir, **METHODS[method]), stages_of(1), **options)


def assert_same_run(run, reference):
    assert all(isinstance(decision, Commit) for decision in reference[0])
    assert run[0] == reference[0]
    assert_same_tensors(run[1], reference[1])


FP32, BF16 = torch.float32, torch.bfloat16
# Each model, method and dtype with one number of stages always, and with all of them under the slow mark.
ALWAYS = [
    ("llama", "plain", FP32, 4),
    ("llama", "dropout", FP32, 3),
    ("llama", "dora_dropout", FP32, 2),
    ("llama", "rank_pattern", FP32, 4),
    ("llama", "plain", BF16, 2),
    ("tied_llama", "tied", FP32, 4),
    ("tied_llama", "tied", BF16, 2),
    ("gpt2", "dropout", FP32, 4),
    ("gpt2", "tied", FP32, 2),
]
SWEEP = [(*case[:3], num_stages) for case in ALWAYS for num_stages in (2, 3, 4)]


@pytest.mark.parametrize(("model", "method", "dtype", "num_stages"), sampled(SWEEP, len(ALWAYS), always=ALWAYS))
def test_training_does_not_depend_on_the_number_of_stages(model_dirs, model, method, dtype, num_stages):
    spec = make_spec(model_dirs[model], **METHODS[method])

    run = trained(spec, stages_of(num_stages), dtype=dtype)

    assert_same_run(run, whole_run(model_dirs[model], method, dtype=dtype))


@pytest.mark.parametrize("model", ["llama", "gpt2"])
def test_training_with_checkpointing_is_training_without(model_dirs, model):
    spec = make_spec(model_dirs[model], dropout=0.1)
    reference = whole_run(model_dirs[model], "dropout", dtype=FP32)

    assert_same_run(trained(spec, stages_of(2), checkpointing=True), reference)
    assert_same_run(trained(spec, stages_of(3), checkpointing=True), reference)


@pytest.mark.parametrize("tables", [((0, 1), (0, 1, 2)), ((0, 0, 0, 1), (2, 0))], ids=["fair", "unfair"])
@pytest.mark.parametrize(("model", "method"), [("llama", "dropout"), ("tied_llama", "tied")])
def test_training_does_not_depend_on_replicas(model_dirs, model, method, tables):
    spec = make_spec(model_dirs[model], **METHODS[method])
    reference = whole_run(model_dirs[model], method, dtype=FP32)

    assert_same_run(trained(spec, stages_of(2, (2, 3), tables)), reference)


def test_stages_that_run_ahead_change_no_bit(model_dirs):
    spec = make_spec(model_dirs["llama"], **METHODS["dropout"])
    stages = [stage.model_copy(update={"ahead": 2 - k}) for k, stage in enumerate(stages_of(3))]

    assert_same_run(trained(spec, stages), whole_run(model_dirs["llama"], "dropout", dtype=FP32))


@pytest.mark.parametrize("empty", [0, 2], ids=["first", "last"])
@pytest.mark.parametrize("num_stages", [2, 3])
def test_micro_batch_without_label_tokens_changes_no_bit(model_dirs, num_stages, empty):
    spec = make_spec(model_dirs["llama"], dropout=0.1)
    rows = [make_rows(m) for m in range(2)]
    rows.insert(empty, make_rows(7, has_labels=False))
    reference = trained(spec, stages_of(1), [Batch(rows)] * 2)

    assert_same_run(trained(spec, stages_of(num_stages), [Batch(rows)] * 2), reference)


def count_messages(pipeline):
    """Messages of each kind by the stage that sends them."""
    sent = []
    for me, executor in pipeline.executors.items():
        send = executor.transport.send

        def counted(peer, key, *args, me=me, send=send, **options):
            sent.append((me.stage_index, key.kind))
            send(peer, key, *args, **options)

        executor.transport.send = counted
    return sent


def test_nothing_flows_back_to_a_stage_with_nothing_to_train(model_dirs):
    spec = make_spec(model_dirs["llama"], **METHODS["blocks"])
    reference = trained(spec, stages_of(1))

    with pipeline_of(spec, stages_of(4)) as pipeline:
        sent = count_messages(pipeline)
        decisions = train(pipeline, make_batches())
        assert_same_run((decisions, pipeline.snapshot()), reference)

    num_micro_batches = sum(len(batch.rows) for batch in make_batches())
    backward = [stage for stage, kind in sent if kind is MessageKind.BACKWARD]
    assert backward == [3] * num_micro_batches
    assert sorted(stage for stage, kind in sent if kind is MessageKind.FORWARD) == sorted([0, 1, 2] * num_micro_batches)


def test_frozen_stages_below_the_first_trainable_one_build_no_graph(model_dirs):
    with pipeline_of(make_spec(model_dirs["llama"], **METHODS["blocks"]), stages_of(2)) as pipeline:
        stage = pipeline.executors[Peer(0)].stage
        graphs = []
        forward = stage.forward

        def watched(inputs):
            output = forward(inputs)
            graphs.append(output.grad_fn)
            return output

        stage.forward = watched
        train(pipeline, make_batches(num_steps=2))

    assert graphs and not any(graphs)


def stock_tied_gradients(model_dir, state, batch):
    """Whole gradients by stock peft, from the given adapter."""
    base = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    config = peft.LoraConfig(
        task_type="CAUSAL_LM", r=4, lora_alpha=16, target_modules=["q_proj", "down_proj"],
        modules_to_save=["lm_head"], ensure_weight_tying=True,
    )  # fmt: skip
    model = peft.get_peft_model(base, config).eval()
    assert not peft.set_peft_model_state_dict(model, state).unexpected_keys
    for rows in batch.rows:
        ids, labels, mask = padded(rows)
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        (
            cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum") / batch.loss_weight
        ).backward()
    return {
        name.replace(".default", "").replace("modules_to_save.", ""): parameter.grad
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


@pytest.mark.parametrize("num_stages", [1, 2])
def test_gradient_of_a_tied_trained_head_is_that_of_stock_peft(model_dirs, num_stages):
    spec, batch = make_spec(model_dirs["tied_llama"], **TIED), make_batches()[0]
    with pipeline_of(spec, stages_of(num_stages)) as pipeline:
        state = pipeline.state()
        pipeline.train_step(0, batch.rows, batch.loss_weight)
        gradients = {name: g for e in pipeline.executors.values() for name, g in e._gradients.items()}

    stock = stock_tied_gradients(model_dirs["tied_llama"], state, batch)
    (tied,) = [name for name in gradients if "lora" not in name]
    assert gradients.keys() == stock.keys()
    # stock peft runs the head on all positions and adds up in another order
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, stock[name], rtol=1e-5, atol=1e-6)
    assert stock[tied].abs().max() > 0


@pytest.mark.parametrize("poisoned", [0, 1])
def test_value_that_is_not_finite_aborts_the_step_with_its_reason_and_leaves_no_trace(model_dirs, poisoned):
    with pipeline_of(make_spec(model_dirs["llama"]), stages_of(2)) as pipeline:
        first, second = make_batches()
        run_step(pipeline, 0, first)
        before = pipeline.snapshot()
        weight = next(p for p in pipeline.executors[Peer(poisoned)].stage.model.parameters() if not p.requires_grad)
        kept = weight.detach().clone()
        weight.data.fill_(math.nan)

        decision = run_step(pipeline, 1, second)

        weight.data.copy_(kept)
        assert isinstance(decision, Abort) and decision.kind is AbortKind.NOT_FINITE
        assert "stage 1.0: the loss of step 1 is nan" in decision.reason
        assert_same_tensors(pipeline.snapshot(), before)
        assert isinstance(run_step(pipeline, 2, second), Commit)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_gradient_that_is_not_finite_under_a_finite_loss_names_its_parameter(model_dirs, bad):
    with pipeline_of(make_spec(model_dirs["llama"]), stages_of(2)) as pipeline:
        parameter = pipeline.executors[Peer(0)].method.parameters[0]
        parameter.uses[0][1].register_hook(lambda gradient: gradient.clone().fill_(bad))

        decision = run_step(pipeline, 0, make_batches()[0])

    assert isinstance(decision, Abort)
    assert f"stage 0.0: the gradient of {parameter.name} has squared norm {bad}" in decision.reason


@pytest.mark.parametrize(("model", "method"), [("llama", "dropout"), ("tied_llama", "tied")])
def test_restored_snapshot_continues_with_the_same_bits_in_any_partition(model_dirs, model, method):
    spec, batches = make_spec(model_dirs[model], **METHODS[method]), make_batches(num_steps=3)
    decisions, last = trained(spec, stages_of(2), batches)
    with pipeline_of(spec, stages_of(2)) as pipeline:
        train(pipeline, batches[:1])
        snapshot = pipeline.snapshot()

    for stages in (stages_of(2), stages_of(1), stages_of(3), stages_of(2, (2, 1), ((0, 1), (0,)))):
        with pipeline_of(spec, stages) as pipeline:
            pipeline.restore(snapshot)
            continued = train(pipeline, batches[1:], first_step=1), pipeline.snapshot()
        assert_same_run(continued, (decisions[1:], last))


def test_snapshot_is_not_changed_by_later_steps(model_dirs):
    with pipeline_of(make_spec(model_dirs["llama"]), stages_of(1)) as pipeline:
        fresh = pipeline.snapshot()
        copies = {name: tensor.clone() for name, tensor in fresh.items()}
        train(pipeline, make_batches())

        assert_same_tensors(fresh, copies)
        pipeline.restore(fresh)
        assert_same_tensors(pipeline.snapshot(), copies)


def test_restore_names_what_the_shadows_lack(model_dirs):
    with pipeline_of(make_spec(model_dirs["llama"]), stages_of(1)) as pipeline:
        snapshot = pipeline.snapshot()
        del snapshot["exp_avg/base_model.model.model.layers.2.mlp.down_proj.lora_B.weight"]

        with pytest.raises(JobError, match=r"lack 1 of 16 parameters, first .*layers\.2\.mlp\.down_proj\.lora_B"):
            pipeline.restore(snapshot)


@pytest.mark.parametrize("options", [{}, {"dtype": torch.bfloat16}], ids=["fp32", "bf16"])
def test_evaluation_loss_does_not_depend_on_the_partition_and_changes_nothing(model_dirs, options):
    spec, batch = make_spec(model_dirs["llama"], dropout=0.1), make_batches()[0]
    losses = []
    for stages in (stages_of(1), stages_of(2), stages_of(4), stages_of(2, (2, 3), ((0, 1), (0, 1, 2)))):
        with pipeline_of(spec, stages, **options) as pipeline:
            before = pipeline.snapshot()
            losses += [pipeline.evaluate(serial, batch.rows) for serial in range(2)]
            assert_same_tensors(pipeline.snapshot(), before)

    assert len(set(losses)) == 1
    assert losses[0] > 0


def test_evaluation_loss_is_that_of_transformers(model_dirs):
    batch = make_batches()[0]
    with pipeline_of(make_spec(model_dirs["llama"]), stages_of(3)) as pipeline:
        loss = pipeline.evaluate(0, batch.rows)

    model = AutoModelForCausalLM.from_pretrained(model_dirs["llama"], dtype=torch.float32).eval()
    expected = 0.0
    for ids, labels, mask in map(padded, batch.rows):
        logits = model(input_ids=ids, attention_mask=mask).logits
        expected += cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum").item()
    assert loss == pytest.approx(expected, rel=1e-6)


def test_step_abandoned_half_way_leaves_nothing_behind(model_dirs):
    spec, batches = make_spec(model_dirs["llama"]), make_batches()
    with pipeline_of(spec, stages_of(1)) as pipeline:
        reference = train(pipeline, batches[1:], first_step=1), pipeline.snapshot()
    with pipeline_of(spec, stages_of(3)) as pipeline:
        cancel_at_call(pipeline, Peer(2), Unit(UnitKind.TRAIN, 0), call=2)
        with pytest.raises(UnitCancelledError):
            pipeline.train_step(0, batches[0].rows, batches[0].loss_weight)

        assert_same_run((train(pipeline, batches[1:], first_step=1), pipeline.snapshot()), reference)


@pytest.mark.parametrize("num_stages", [1, 2])
def test_cancelled_evaluation_ends_before_its_next_micro_batch_and_the_next_one_is_whole(model_dirs, num_stages):
    """A single stage has no transport that would notice."""
    rows = make_batches()[0].rows
    with pipeline_of(make_spec(model_dirs["llama"]), stages_of(num_stages)) as pipeline:
        reference = pipeline.evaluate(0, rows)
        cancel_at_call(pipeline, Peer(0), Unit(UnitKind.EVALUATE, 1), call=2)
        cancelling = pipeline.executors[Peer(0)].stage.forward
        calls = []
        pipeline.executors[Peer(0)].stage.forward = lambda inputs: calls.append(1) or cancelling(inputs)

        with pytest.raises(UnitCancelledError):
            pipeline.evaluate(1, rows)

        assert len(calls) == 2 < len(rows)
        assert pipeline.evaluate(2, rows) == reference


def test_failure_of_one_executor_ends_the_others_and_is_what_is_raised(model_dirs):
    with pipeline_of(make_spec(model_dirs["llama"]), stages_of(3)) as pipeline:

        def fail(inputs):
            raise ZeroDivisionError("a fault of ours")

        pipeline.executors[Peer(1)].stage.forward = fail
        batch = make_batches()[0]

        with pytest.raises(ZeroDivisionError):
            pipeline.train_step(0, batch.rows, batch.loss_weight)
        with pytest.raises(PeerLostError):
            pipeline.train_step(1, batch.rows, batch.loss_weight)
