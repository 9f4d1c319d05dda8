"""What holds for every objective of the registry: partition invariance, exact resume, one place each."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from edge_node.objectives.registry import OBJECTIVES
from edge_node.transport.base import Peer, UnitCancelledError
from plutino.job.objective import DaptConfig, SftConfig
from plutino.types import Unit, UnitKind
from tests.numerics.objective_cases import CASES, CONFIGS, ONE_EACH, batches_for, packed, rows_for, unpacked
from tests.numerics.pipelines import (
    assert_same_tensors,
    cancel_at_call,
    make_rows,
    make_spec,
    pipeline_of,
    stages_of,
    train,
)

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

DOCS = Path(__file__).resolve().parents[2] / "docs" / "ref-objectives.md"


def spec_of(model_dir, config, **method):
    return make_spec(model_dir, **method).model_copy(update={"objective": config})


_RESULTS: dict[tuple[str, str, int], tuple] = {}


def result_of(model_dir, config, num_stages):
    """Decisions, adapter, held-out loss and the rows' values after three steps; kept for the other tests."""
    key = (str(model_dir), config.model_dump_json(), num_stages)
    if key not in _RESULTS:
        with pipeline_of(spec_of(model_dir, config, dropout=0.1), stages_of(num_stages)) as pipeline:
            decisions = train(pipeline, batches_for(config))
            held_out = pipeline.evaluate_rows(0, [rows_for(config, 77), rows_for(config, 78)])
            _RESULTS[key] = decisions, pipeline.state(), held_out
    return _RESULTS[key]


def assert_same_result(found, expected):
    assert found[0] == expected[0]
    assert_same_tensors(found[1], expected[1])
    assert found[2][0] == expected[2][0]
    assert [values.tolist() for values in found[2][1]] == [values.tolist() for values in expected[2][1]]


def test_every_objective_has_cases_and_a_row_in_the_docs():
    # Encoder-decoders have tests of their own.
    assert CONFIGS.keys() | {"seq2seq"} == OBJECTIVES.keys()
    text = DOCS.read_text()
    assert not [name for name in OBJECTIVES if f"| `{name}` |" not in text]


@pytest.mark.parametrize(
    ("objective", "name", "num_stages"),
    [(*case, 3) for case in CASES] + [(objective, None, 2) for objective in CONFIGS],
)
def test_partition_changes_no_bit_of_losses_adapter_and_values(model_dirs, objective, name, num_stages):
    config = next(iter(CONFIGS[objective].values())) if name is None else CONFIGS[objective][name]

    assert_same_result(result_of(model_dirs["llama"], config, num_stages), result_of(model_dirs["llama"], config, 1))


@pytest.mark.parametrize("objective", CONFIGS)
def test_training_moves_every_parameter_and_gpt2_is_split_alike(model_dirs, objective):
    config = next(iter(CONFIGS[objective].values()))
    whole = result_of(model_dirs["gpt2"], config, 1)

    assert_same_result(result_of(model_dirs["gpt2"], config, 3), whole)
    with pipeline_of(spec_of(model_dirs["gpt2"], config), stages_of(1)) as pipeline:
        start = pipeline.state()
    assert start.keys() == whole[1].keys()
    assert not [name for name, value in whole[1].items() if torch.equal(value, start[name])]


@pytest.mark.parametrize(("objective", "name"), ONE_EACH)
def test_replicas_change_no_bit(model_dirs, objective, name):
    config = CONFIGS[objective][name]
    whole = result_of(model_dirs["llama"], config, 1)

    replicated = stages_of(2, (2, 2), ((0, 1), (0, 1)))
    with pipeline_of(spec_of(model_dirs["llama"], config, dropout=0.1), replicated) as pipeline:
        assert train(pipeline, batches_for(config)) == whole[0]
        assert_same_tensors(pipeline.state(), whole[1])


@pytest.mark.parametrize(("objective", "name"), ONE_EACH)
def test_resumed_in_the_middle_on_another_partition_a_job_ends_with_the_same_bits(model_dirs, objective, name):
    config = CONFIGS[objective][name]
    batches = batches_for(config)
    whole = result_of(model_dirs["llama"], config, 1)
    spec = spec_of(model_dirs["llama"], config, dropout=0.1)
    with pipeline_of(spec, stages_of(3)) as pipeline:
        first = train(pipeline, batches[:1])
        snapshot = pipeline.snapshot()

    with pipeline_of(spec, stages_of(2)) as pipeline:
        pipeline.restore(snapshot)
        assert first + train(pipeline, batches[1:], first_step=1) == whole[0]
        assert_same_tensors(pipeline.state(), whole[1])


@pytest.mark.parametrize("model", ["llama", "gpt2"])
@pytest.mark.parametrize("num_stages", [1, 3])
def test_packed_documents_do_not_see_each_other(model_dirs, model, num_stages):
    """Against the same documents one to a row; other shapes sum in another order, hence the tolerance."""
    rows = [packed(*(make_rows(10 * m + row, 3) for row in range(2))) for m in range(2)]
    apart = [unpacked(each) for each in rows]
    weight = float(sum(each.label_mask.sum() for each in rows))
    gradients = []
    for micro_batches in (rows, apart):
        with pipeline_of(spec_of(model_dirs[model], DaptConfig()), stages_of(num_stages)) as pipeline:
            outcomes = pipeline.train_step(0, micro_batches, weight)
            gradients.append([n for me in sorted(outcomes, key=str) for n in outcomes[me].squared_norms])
            gradients.append([sum(outcome.loss_sum for outcome in outcomes.values())])

    np.testing.assert_allclose(gradients[0], gradients[2], rtol=1e-5, atol=1e-9)
    np.testing.assert_allclose(gradients[1], gradients[3], rtol=1e-5)


def test_packed_documents_that_did_see_each_other_would_be_noticed(model_dirs):
    rows = packed(make_rows(1, 3), make_rows(2, 3))
    unmasked = unpacked(rows)
    with pipeline_of(spec_of(model_dirs["llama"], SftConfig()), stages_of(1)) as pipeline:
        apart = pipeline.evaluate(0, [rows])
        joined = pipeline.evaluate(1, [replace(rows, segment_lengths=None)])
        assert pipeline.evaluate(2, [unmasked]) == pytest.approx(apart, rel=1e-5)

    assert joined != pytest.approx(apart, rel=1e-3)


def test_dpo_starts_at_the_base_and_its_reference_stays_the_base(model_dirs):
    """The reference is the pipeline's own base: no second copy, and no drift with training."""
    config = CONFIGS["dpo"]["sigmoid"]
    rows = [rows_for(config, 5)]
    with pipeline_of(spec_of(model_dirs["llama"], config), stages_of(2)) as pipeline:
        loss_sum, values = pipeline.evaluate_rows(0, rows)
        assert loss_sum == pytest.approx(2 * np.log(2), rel=1e-6)  # two pairs, no margin
        assert not values[0].any()
        references = []
        for attempt in range(2):
            last = pipeline.executors[max(pipeline.executors, key=lambda me: me.stage_index)]
            seen = []
            reference = last._objective.reference
            last._objective.reference = lambda *args, reference=reference, seen=seen: (
                seen.append(reference(*args)) or seen[-1]
            )
            pipeline.evaluate(1 + attempt, rows)
            last._objective.reference = reference
            references.append(seen[0])
            train(pipeline, batches_for(config), first_step=3 * attempt)
        assert pipeline.evaluate(9, rows) != loss_sum
    assert torch.equal(*references)


def test_a_unit_cancelled_in_its_reference_pass_leaves_the_adapter_on(model_dirs):
    config = CONFIGS["dpo"]["sigmoid"]
    batch = batches_for(config)[0]
    with pipeline_of(spec_of(model_dirs["llama"], config), stages_of(2)) as pipeline:
        train(pipeline, batches_for(config)[:1])
        before = pipeline.evaluate(0, batch.rows)
        unit = Unit(UnitKind.EVALUATE, 1)
        cancel_at_call(pipeline, Peer(0), unit, call=2)
        with pytest.raises(UnitCancelledError):
            pipeline.evaluate(1, batch.rows)
        assert pipeline.evaluate(2, batch.rows) == before
