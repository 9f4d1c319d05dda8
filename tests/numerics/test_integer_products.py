"""Jobs whose int8 layers multiply integers: the same bits over any cuts, and no gradient that gets lost unnoticed."""

from __future__ import annotations

import pytest

from edge_node.quantize.linear import QuantLinear
from plutino.errors import QuantizationError
from plutino.job.method import ParallelAdaptersConfig
from plutino.job.model import Packing
from tests.numerics.pipelines import assert_same_tensors, make_batches, make_spec, pipeline_of, stages_of, train

INTEGER = Packing(scheme="int8", head="int8", products="integer")


def trained(model_dir, num_stages, packing):
    spec = make_spec(model_dir).model_copy(update={"method": ParallelAdaptersConfig(reduction=2)})
    with pipeline_of(spec, stages_of(num_stages), packing=packing) as pipeline:
        return train(pipeline, make_batches()), pipeline.state()


@pytest.mark.parametrize("model", ["llama", "gpt2"])
def test_integer_products_give_the_same_losses_and_adapters_over_any_cuts(model_dirs, model):
    decisions, whole = trained(model_dirs[model], 1, INTEGER)

    for num_stages in (2, 3):
        cut_decisions, state = trained(model_dirs[model], num_stages, INTEGER)
        assert cut_decisions == decisions
        assert_same_tensors(state, whole)
    # They are used: dequantised weights give near losses, and others.
    plain, _ = trained(model_dirs[model], 1, INTEGER.model_copy(update={"products": "dequantised"}))
    losses = [[decision.loss for decision in of_path] for of_path in (decisions, plain)]
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=0.05)


def test_blocks_multiply_integers_and_the_head_which_gradients_pass_does_not(model_dirs):
    spec = make_spec(model_dirs["llama"]).model_copy(update={"method": ParallelAdaptersConfig(reduction=2)})
    with pipeline_of(spec, stages_of(1), packing=INTEGER) as pipeline:
        (executor,) = pipeline.executors.values()
        layers = {
            name: module.products
            for name, module in executor.stage.model.named_modules()
            if isinstance(module, QuantLinear)
        }
    assert {products for name, products in layers.items() if ".layers." in name} == {"integer"}
    assert layers["lm_head"] == "dequantised"


def test_method_that_needs_a_gradient_through_the_blocks_fails_instead_of_training_half_of_them(model_dirs):
    with pipeline_of(make_spec(model_dirs["llama"]), stages_of(1), packing=INTEGER) as pipeline:
        batch = make_batches()[0]
        with pytest.raises(QuantizationError, match="no gradient"):
            pipeline.train_step(0, batch.rows, batch.loss_weight)
