"""Sums of gradients that are rounded to 16 bits after each addition: no plan changes a bit of them either."""

from __future__ import annotations

from functools import cache

import pytest
import torch

from coordinator.jobs.barrier import Abort, Commit
from edge_node.engine import shared_gradients
from edge_node.transport.base import MessageKind, Peer
from plutino.job.placement import PlacementConfig
from tests.numerics.method_cases import CONFIGS
from tests.numerics.pipelines import make_batches, make_spec, pipeline_of, run_step, stages_of, train
from tests.numerics.test_engine import METHODS, assert_same_run, trained
from tests.sampling import sampled

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning"),
]

UNFAIR = ((0, 0, 0, 1), (2, 0))
PLANS = {
    "2 stages": stages_of(2),
    "4 stages": stages_of(4),
    "2 replicas": stages_of(1, (2,), ((0, 1),)),
    "3 replicas": stages_of(1, (3,), ((0, 1, 2),)),
    "4 replicas, 3 in turns": stages_of(1, (4,), ((2, 0, 2, 1),)),
    "1 and 3 replicas": stages_of(2, (1, 3), ((), (0, 1, 2))),
    "2 and 3 replicas": stages_of(2, (2, 3), UNFAIR),
}
SHARED = "prefix", "projected"
"""Its projection is used by all blocks, so that all stages add up its gradients."""


def spec_of(model_dir, method, **placement):
    if isinstance(method, tuple):
        spec = make_spec(model_dir)
        spec = spec.model_copy(update={"method": CONFIGS[method[0]][method[1]]})
    else:
        spec = make_spec(model_dir, **METHODS[method])
    return spec.model_copy(update={"placement": PlacementConfig(**({"sums": "fp16"} | placement))})


@cache
def whole(model_dir, method, **placement):
    return trained(spec_of(model_dir, method, **placement), stages_of(1))


OTHERS = (SHARED, ("full", "all"), ("adapters", "houlsby"), ("parallel_adapters", "pruned"))
CASES = [
    *(("llama", "dropout", plan) for plan in PLANS),
    *(("tied_llama", "tied", plan) for plan in ("4 stages", "3 replicas", "2 and 3 replicas")),
    *(("llama", method, plan) for method in OTHERS for plan in ("2 stages", "2 and 3 replicas")),
]
ALWAYS = [
    ("llama", "dropout", "2 stages"),
    ("llama", "dropout", "4 replicas, 3 in turns"),
    ("llama", "dropout", "2 and 3 replicas"),
    ("tied_llama", "tied", "4 stages"),
    ("tied_llama", "tied", "2 and 3 replicas"),
    ("llama", SHARED, "2 and 3 replicas"),
]


@pytest.mark.parametrize(("model", "method", "plan"), sampled(CASES, len(ALWAYS), always=ALWAYS))
def test_rounded_sums_do_not_depend_on_the_plan(model_dirs, model, method, plan):
    run = trained(spec_of(model_dirs[model], method), PLANS[plan])

    assert_same_run(run, whole(model_dirs[model], method))


def test_rounded_sums_in_a_message_for_each_parameter_have_the_same_bits(model_dirs, monkeypatch):
    monkeypatch.setattr(shared_gradients, "MAX_GROUP_BYTES", 1)

    run = trained(spec_of(model_dirs["tied_llama"], "tied"), PLANS["2 and 3 replicas"])

    assert_same_run(run, whole(model_dirs["tied_llama"], "tied"))


def test_rounded_sums_change_the_bits_of_exact_ones_and_half_the_bytes_of_gradients(model_dirs):
    sent = {}
    for sums in ("fp32", "fp16"):
        spec = spec_of(model_dirs["llama"], "plain", sums=sums)
        with pipeline_of(spec, PLANS["2 replicas"]) as pipeline:
            sent[sums] = bytes_of_gradients(pipeline)
            decisions = train(pipeline, make_batches(1))
            sent[sums] = sum(sent[sums]), decisions

    assert sent["fp16"][1] != sent["fp32"][1]
    # Beside each parameter's numbers travels its exponent.
    assert 0.5 < sent["fp16"][0] / sent["fp32"][0] < 0.51


def bytes_of_gradients(pipeline):
    """Bytes of each message of a sum, as they are sent from now on."""
    found = []
    for executor in pipeline.executors.values():
        send = executor.transport.send

        def counted(peer, key, tensors, *, send=send, **options):
            if key.kind in (MessageKind.PARTIAL_GRADIENT, MessageKind.TOTAL_GRADIENT):
                found.append(sum(tensor.nbytes for tensor in tensors.values()))
            send(peer, key, tensors, **options)

        executor.transport.send = counted
    return found


def test_free_numerics_round_what_replicas_hand_over_and_nothing_that_one_worker_has_alone(model_dirs):
    spec = spec_of(model_dirs["llama"], "plain", numerics="free")

    alone = trained(spec, stages_of(2))
    first, again = trained(spec, PLANS["2 and 3 replicas"]), trained(spec, PLANS["2 and 3 replicas"])

    assert_same_run(alone, whole(model_dirs["llama"], "plain", sums="fp32"))
    assert_same_run(first, again)
    assert first[0] != alone[0]


def test_gradient_that_is_not_finite_still_skips_the_step(model_dirs):
    with pipeline_of(spec_of(model_dirs["llama"], "plain"), PLANS["2 and 3 replicas"]) as pipeline:
        parameter = pipeline.executors[Peer(0, 1)].method.parameters[0]
        hook = parameter.uses[0][1].register_hook(lambda gradient: gradient.clone().fill_(float("inf")))
        before = pipeline.snapshot()

        decision = run_step(pipeline, 0, make_batches()[0])
        hook.remove()

        assert isinstance(decision, Abort) and parameter.name in decision.reason
        assert all(torch.equal(value, before[name]) for name, value in pipeline.snapshot().items())
        assert isinstance(run_step(pipeline, 1, make_batches()[0]), Commit)


def test_losses_of_twenty_steps_stay_near_those_of_exact_sums(model_dirs):
    batches = make_batches(num_steps=5, num_micro_batches=3) * 4
    spec = make_spec(model_dirs["llama"], training={"lr_schedule": "constant", "lr": 3e-3})
    losses = {}
    for sums in ("fp32", "fp16"):
        of_sums = spec.model_copy(update={"placement": PlacementConfig(sums=sums)})
        losses[sums] = [decision.loss for decision in trained(of_sums, stages_of(1), batches)[0]]

    assert losses["fp32"][-1] < losses["fp32"][4] - 0.1
    # A gradient that is wrong by 2^-11 of itself moves AdamW's update by about as much of itself; 5e-6 measured.
    assert losses["fp16"] == pytest.approx(losses["fp32"], rel=5e-5)
    assert losses["fp16"] != losses["fp32"]
