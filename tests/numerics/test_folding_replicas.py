"""Replicas that add up their own micro-batches before they hand them over; and gradients that go in many messages."""

from __future__ import annotations

import pytest

from coordinator.jobs.barrier import Commit
from edge_node.engine import shared_gradients
from edge_node.transport.base import MessageKind
from plutino.job.placement import PlacementConfig
from tests.numerics.pipelines import make_batches, make_spec, pipeline_of, stages_of, train
from tests.numerics.test_engine import METHODS, assert_same_run, count_messages, trained

REPLICAS = stages_of(2, (2, 3), ((0, 0, 0, 1), (2, 0)))
"""Shares so uneven that a replica has no micro-batch in one of the steps."""
TOLERANCE = 1e-5


@pytest.mark.parametrize(("model", "method"), [("llama", "dropout"), ("tied_llama", "tied")])
def test_replicas_that_fold_repeat_their_bits_and_stay_near_one_worker(model_dirs, model, method):
    spec = make_spec(model_dirs[model], **METHODS[method])
    free = spec.model_copy(update={"placement": PlacementConfig(numerics="free")})

    whole, run, again = trained(spec, stages_of(1)), trained(free, REPLICAS), trained(free, REPLICAS)

    assert_same_run(again, run)
    for decision, reference in zip(run[0], whole[0], strict=True):
        assert isinstance(decision, Commit)
        # The norm is of sums in another order.
        assert decision.loss == pytest.approx(reference.loss, abs=TOLERANCE)
        assert decision.total_norm == pytest.approx(reference.total_norm, rel=TOLERANCE)


@pytest.mark.parametrize(
    ("numerics", "owners", "expected"),
    [("fixed", (0, 1, 0), 2), ("fixed", (0, 0, 1), 1), ("free", (0, 1, 0), 1)],
)
def test_sum_is_sent_where_micro_batches_change_their_owner_and_of_replicas_that_fold_once(
    model_dirs, numerics, owners, expected
):
    spec = make_spec(model_dirs["llama"]).model_copy(update={"placement": PlacementConfig(numerics=numerics)})
    with pipeline_of(spec, stages_of(1, (2,), (owners,))) as pipeline:
        sent = count_messages(pipeline)
        train(pipeline, make_batches(1))

    assert sum(kind is MessageKind.PARTIAL_GRADIENT for _, kind in sent) == expected


@pytest.mark.parametrize(("model", "method"), [("llama", "plain"), ("tied_llama", "tied")])
def test_gradients_in_a_message_for_each_parameter_have_the_same_bits(model_dirs, monkeypatch, model, method):
    spec = make_spec(model_dirs[model], **METHODS[method])
    reference = trained(spec, stages_of(1))
    monkeypatch.setattr(shared_gradients, "MAX_GROUP_BYTES", 1)

    assert_same_run(trained(spec, REPLICAS), reference)
