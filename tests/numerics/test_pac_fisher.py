"""Side networks that start from gradients of the blocks: the right squares, the same in every partition, once."""

from __future__ import annotations

import pytest
import torch

from edge_node.methods.pruning import Axes, add_sums, choose_places, no_scores
from edge_node.stage.architecture import count_blocks
from partitioner.adapter import adapter_params_of
from partitioner.memory import stage_memory
from partitioner.shape import JobShape
from plutino.families import family_of
from plutino.job.method import FullConfig, ParallelAdaptersConfig
from plutino.job.model import Packing
from plutino.job.objective import ClassificationConfig, Seq2SeqConfig
from tests.numerics.objective_cases import CLASSES, batches_for
from tests.numerics.pipelines import (
    assert_same_tensors,
    decide_step,
    make_batches,
    make_spec,
    pipeline_of,
    stages_of,
    train,
)
from tests.numerics.tiny_families import describe_folder, save_model
from tests.sampling import sampled

FISHER = ParallelAdaptersConfig(reduction=2, init="fisher")
UPPER = FISHER.model_copy(update={"blocks": (2, 3)})
MAGNITUDE = ParallelAdaptersConfig(reduction=2)
CLASSIFIES = ClassificationConfig(labels=CLASSES)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {name: save_model(name, tmp_path_factory.mktemp(name)) for name in ("llama", "gpt2", "bert", "t5", "bart")}


def spec_of(folder, method, objective=None):
    spec = make_spec(folder).model_copy(update={"method": method})
    return spec if objective is None else spec.model_copy(update={"objective": objective})


def begun(spec, batches, num_stages, **options):
    """Values before step 0, after its gradients, and after all steps, with the decisions."""
    with pipeline_of(spec, stages_of(num_stages), **options) as pipeline:
        by_magnitude, base = pipeline.state(), pipeline.evaluate(100, batches[0].rows, without_adapter=True)
        outcomes = pipeline.train_step(0, batches[0].rows, batches[0].loss_weight)
        first = pipeline.state()
        assert pipeline.evaluate(101, batches[0].rows) == base
        decision = decide_step(pipeline, 0, batches[0].loss_weight, outcomes, None)
        pipeline.commit(0, decision.clip_scale)
        decisions = [decision, *train(pipeline, batches[1:], first_step=1)]
        assert not [
            n for e in pipeline.executors.values() for n, p in e.stage.model.named_parameters() if p.grad is not None
        ]
        return by_magnitude, first, pipeline.state(), decisions


def assert_same_start_and_steps(whole, split):
    for one, other in zip(whole[:3], split[:3], strict=True):
        assert_same_tensors(one, other)
    assert whole[3] == split[3]
    chosen = [key for key in whole[0] if ".down." in key and key.endswith("weight")]
    assert any(not torch.equal(whole[0][key], whole[1][key]) for key in chosen)


CASES = [
    ("llama", FISHER, None),
    ("llama", UPPER, None),
    ("gpt2", FISHER, None),
    ("bert", FISHER, CLASSIFIES),
    ("llama", FISHER, CLASSIFIES),
    ("t5", FISHER, Seq2SeqConfig()),
    ("bart", FISHER, Seq2SeqConfig()),
]


@pytest.mark.parametrize(("name", "method", "objective"), sampled(CASES, 3, always=(CASES[1], CASES[3], CASES[5])))
def test_start_is_the_same_for_every_partition_and_leaves_step_0_the_base(folders, name, method, objective):
    batches = make_batches() if not isinstance(objective, ClassificationConfig) else batches_for(objective)
    spec = spec_of(folders[name], method, objective)

    assert_same_start_and_steps(*(begun(spec, batches, num_stages) for num_stages in (1, 3)))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_places_kept_have_the_largest_squared_gradients_of_full_fine_tuning(folders, name):
    batch = make_batches()[0]
    expected = {}
    with pipeline_of(spec_of(folders[name], FullConfig()), stages_of(1)) as pipeline:
        (executor,) = pipeline.executors.values()
        stage = executor.stage
        config = stage.config
        head = config.hidden_size // config.num_attention_heads
        axes = Axes(hidden=config.hidden_size, head=head, inner=getattr(config, "intermediate_size", 4 * 32))
        for block in range(count_blocks(config)[0]):
            scores = no_scores(axes)
            for rows in batch.rows:
                pipeline.train_step(0, [rows], batch.loss_weight)
                for linear in stage.family.all_linears:
                    gradient = executor._gradients[f"{stage.family.block_name(block, 0)}.{linear}.weight"]
                    squares = (gradient.T if stage.family.has_conv1d else gradient).square()
                    add_sums(scores, squares, stage.family, linear, axes)
                pipeline.drop()
            expected[block] = choose_places(scores, axes, 2)["hidden"]

    _, first, *_ = begun(spec_of(folders[name], FISHER), make_batches(), 1)

    for block, places in expected.items():
        (down,) = (value for key, value in first.items() if key.endswith(f"side.down.{block}.weight"))
        assert torch.equal(down.argmax(dim=1), places)


@pytest.mark.parametrize("size", [(300, 130), (64, 513), (5, 3)])
def test_sums_taken_in_strips_have_the_bits_of_sums_of_the_whole_matrix(size):
    matrix = torch.rand(size, generator=torch.Generator().manual_seed(0))
    axes = Axes(hidden=size[1], head=1, inner=size[0])
    scores = no_scores(axes)

    add_sums(scores, matrix, family_of("llama"), "mlp.up_proj", axes)

    assert torch.equal(scores["inner"], matrix.sum(dim=1, dtype=torch.float64))
    assert torch.equal(scores["hidden"], matrix.sum(dim=0, dtype=torch.float64))


def test_packed_blocks_are_pruned_by_the_gradients_of_their_dequantised_weights(folders):
    spec, packing = spec_of(folders["llama"], FISHER), Packing(scheme="int8")

    assert_same_start_and_steps(*(begun(spec, make_batches(), num_stages, packing=packing) for num_stages in (1, 2)))


def test_planner_bills_the_one_pass_backward_through_the_blocks(folders):
    table = describe_folder(folders["llama"])

    def bill(method):
        adapter = adapter_params_of(table, method)
        shape = JobShape(
            micro_batch_rows=4,
            row_tokens=64,
            label_tokens=64,
            batch_rows=16,
            dtype="fp32",
            **adapter.shape_fields,
        )
        items = stage_memory(table, shape, start_block=0, end_block=4, num_stages=1, stage_index=0, checkpointing=False)
        return {item.name: item.bytes for item in items}

    plain, fisher = bill(MAGNITUDE), bill(FISHER)
    assert "pruning" not in plain
    assert fisher["pruning"] > 0
    assert {name: size for name, size in fisher.items() if name not in ("pruning", "allocator")} == {
        name: size for name, size in plain.items() if name != "allocator"
    }
