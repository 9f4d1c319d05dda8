from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from edge_node.engine.shared_gradients import plan_groups
from edge_node.engine.taken_gradients import FOLDED, PassesAbandonedError, TakenGradients
from edge_node.methods.base import TrainableParameter
from edge_node.transport.base import Peer
from plutino.job.assignment import StageShape

WAIT_S = 20.0


class Held(torch.autograd.Function):
    """Holds the backward pass at this place until it may go on."""

    may_go_on: threading.Event

    @staticmethod
    def forward(context, x, may_go_on):
        context.may_go_on = may_go_on
        return x.clone()

    @staticmethod
    def backward(context, gradient):
        assert context.may_go_on.wait(WAIT_S)
        return gradient, None


def two_layers():
    """A lower and an upper parameter, one number each."""
    parameters = {name: nn.Parameter(torch.tensor([2.0])) for name in ("blocks.0.a", "blocks.1.a")}
    return parameters, [TrainableParameter(name, (("block", p),), ("block",)) for name, p in parameters.items()]


def run_backward(parameters, may_go_on):
    lower, upper = parameters.values()
    (upper * Held.apply(lower * 3.0, may_go_on)).sum().backward()


@pytest.mark.parametrize("is_folded", [False, True], ids=["apart", "folded"])
def test_upper_gradient_is_there_while_the_pass_below_still_runs(is_folded):
    parameters, trainable = two_layers()
    taken = TakenGradients(trainable, parameters, is_folded=is_folded, is_rounded=False)
    place = FOLDED if is_folded else 0
    may_go_on = threading.Event()
    taken.start([0])
    with ThreadPoolExecutor(2) as pool:

        def pass_of_0():
            taken.begin_pass(0)
            run_backward(parameters, may_go_on)
            taken.end_pass(0)

        running = pool.submit(pass_of_0)
        waiting = pool.submit(taken.wait_for, ["blocks.1.a"], "block", [place])
        try:
            waiting.result(WAIT_S)
            assert taken.of("blocks.1.a")["block", place].item() == 6.0
            assert not taken.of("blocks.0.a") and not running.done()
        finally:
            may_go_on.set()
        running.result(WAIT_S)
    taken.end_passes()

    assert taken.of("blocks.0.a")["block", place].item() == 6.0
    assert all(p.grad is None for p in parameters.values())


def test_folded_gradient_is_there_only_when_the_last_pass_has_given_it():
    parameters, trainable = two_layers()
    taken = TakenGradients(trainable, parameters, is_folded=True, is_rounded=False)
    free = threading.Event()
    free.set()
    taken.start([0, 2])
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(taken.wait_for, ["blocks.1.a"], "block", [FOLDED])
        taken.begin_pass(0)
        run_backward(parameters, free)
        taken.end_pass(0)
        assert not waiting.done()
        taken.begin_pass(2)
        run_backward(parameters, free)
        waiting.result(WAIT_S)
        taken.end_pass(2)

    assert taken.of("blocks.1.a")["block", FOLDED].item() == 12.0


def test_parameter_without_a_gradient_is_known_when_its_pass_is_over():
    parameters, trainable = two_layers()
    taken = TakenGradients(trainable, parameters, is_folded=False, is_rounded=False)
    taken.start([0])
    taken.begin_pass(0)
    (parameters["blocks.1.a"] * 2.0).sum().backward()
    taken.end_pass(0)

    taken.wait_for(["blocks.0.a", "blocks.1.a"], "block", [0])

    assert taken.of("blocks.0.a") == {}
    assert taken.of("blocks.1.a")["block", 0].item() == 2.0


def test_whoever_waits_for_passes_that_fail_hears_of_it():
    parameters, trainable = two_layers()
    taken = TakenGradients(trainable, parameters, is_folded=False, is_rounded=False)
    taken.start([0])
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(taken.wait_for, ["blocks.1.a"], "block", [0])
        taken.abandon()
        with pytest.raises(PassesAbandonedError):
            waiting.result(WAIT_S)

    with pytest.raises(PassesAbandonedError):
        taken.wait_for(["blocks.0.a"], "block", [0])


def test_nothing_is_taken_from_parameters_after_the_passes():
    parameters, trainable = two_layers()
    taken = TakenGradients(trainable, parameters, is_folded=False, is_rounded=False)
    taken.start([0])
    taken.end_passes()

    (parameters["blocks.1.a"] * 2.0).sum().backward()

    assert parameters["blocks.1.a"].grad is not None


def test_groups_of_replicas_come_as_a_backward_pass_does_and_before_those_of_several_stages(monkeypatch):
    monkeypatch.setattr("edge_node.engine.shared_gradients.MAX_GROUP_BYTES", 1)
    stages = [StageShape(start_block=0, end_block=4, num_replicas=2, micro_batch_owner=(0, 1))]
    stages.append(StageShape(start_block=4, end_block=6))
    names = ["norm", "encoder.block.1.a", "decoder.block.0.a", "decoder.block.10.a", "decoder.block.9.a"]

    def trained(name, roles):
        return TrainableParameter(name, ((roles[0], nn.Parameter(torch.zeros(1))),), roles)

    parameters = [trained("embed", ("embedding", "head")), *(trained(name, ("block",)) for name in names)]
    groups, _ = plan_groups(parameters, stages, Peer(0, 1))

    assert [name for group in groups for name in group.names] == [
        "decoder.block.10.a",
        "decoder.block.9.a",
        "decoder.block.0.a",
        "encoder.block.1.a",
        "norm",
        "embed",
    ]
