"""Deep prompts beside a trained score head: what P-tuning v2 is for, against stock peft and over partitions."""

from __future__ import annotations

import peft
import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForSequenceClassification

from coordinator.artifacts.verify_process import Probe, ProbeRows
from edge_node.stage.verify import part_difference
from edge_node.transport.base import Peer
from plutino.job.method import PTuningV2Config
from plutino.job.objective import ClassificationConfig
from tests.numerics.objective_cases import CLASSES, batches_for, rows_for
from tests.numerics.pipelines import assert_same_tensors, make_spec, padded, pipeline_of, stages_of, train
from tests.numerics.test_methods import export

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

CLASSIFICATION = ClassificationConfig(labels=CLASSES)
HEAD = "base_model.model.score.weight"


def spec_of(model_dir, *, dropout=0.0):
    method = PTuningV2Config(num_virtual_tokens=4, dropout=dropout)
    return make_spec(model_dir).model_copy(update={"method": method, "objective": CLASSIFICATION})


@pytest.mark.parametrize("model", ["llama", "gpt2"])
def test_partition_changes_no_bit_and_every_parameter_is_trained(model_dirs, model):
    results = []
    for num_stages in (1, 3):
        with pipeline_of(spec_of(model_dirs[model], dropout=0.2), stages_of(num_stages)) as pipeline:
            start = pipeline.state()
            decisions = train(pipeline, batches_for(CLASSIFICATION))
            results.append((decisions, pipeline.state()))

    assert results[0][0] == results[1][0]
    assert_same_tensors(results[0][1], results[1][1])
    assert start.keys() == results[0][1].keys() == {HEAD, *(f"prompt_embeddings.{block}" for block in range(4))}
    assert not [name for name, value in results[0][1].items() if torch.equal(value, start[name])]


def test_loss_and_first_gradients_are_those_of_stock_peft_on_the_unsplit_model(model_dirs):
    batch = batches_for(CLASSIFICATION)[0]
    with pipeline_of(spec_of(model_dirs["llama"]), stages_of(3)) as pipeline:
        outcomes = pipeline.train_step(0, batch.rows, batch.loss_weight)
        found = {name: grad for e in pipeline.executors.values() for name, grad in e._gradients.items()}
        state, saved = pipeline.state(), pipeline.executors[Peer(0)].method.peft_config()
    base = AutoModelForSequenceClassification.from_pretrained(model_dirs["llama"], num_labels=len(CLASSES))
    config = {key: value for key, value in saved.items() if key != "peft_type"}
    stock = peft.get_peft_model(base, peft.PrefixTuningConfig(**config | {"inference_mode": False})).eval()
    table = stock.prompt_encoder["default"].embedding.weight
    head = stock.base_model.score.modules_to_save["default"].weight
    with torch.no_grad():
        table.copy_(torch.cat([state[f"prompt_embeddings.{block}"] for block in range(4)], dim=1))
        head.copy_(state[HEAD])
    total = 0.0
    for rows in batch.rows:
        ids, _, mask = padded(rows)
        scores = stock(input_ids=ids, attention_mask=mask).logits
        loss = functional.cross_entropy(scores, torch.from_numpy(rows.labels).long(), reduction="sum")
        (loss / batch.loss_weight).backward()
        total += loss.item()

    assert outcomes[Peer(2)].loss_sum == pytest.approx(total, rel=1e-5)
    expected = dict(zip((f"prompt_embeddings.{block}" for block in range(4)), table.grad.chunk(4, dim=1), strict=True))
    assert found.keys() == {HEAD, *expected}
    for name, gradient in (expected | {HEAD: head.grad}).items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-5)


def test_published_prompts_and_head_are_what_stock_peft_loads_with_the_pipelines_loss(model_dirs, tmp_path):
    spec, rows = spec_of(model_dirs["llama"]), [rows_for(CLASSIFICATION, 77), rows_for(CLASSIFICATION, 78)]
    with pipeline_of(spec, stages_of(3)) as pipeline:
        train(pipeline, batches_for(CLASSIFICATION))
        probe = Probe(
            micro_batches=tuple(map(ProbeRows.of, rows)),
            loss_sum=pipeline.evaluate(0, rows),
            num_counted=sum(len(each.lengths) for each in rows),
            objective=CLASSIFICATION,
            dtype="fp32",
        )
        assembled, published = export(pipeline, spec, tmp_path / "out", probe)
        differences = [part_difference(e.stage, e.method, published) for e in pipeline.executors.values()]

    assert sorted(published) == ["base_model.score.weight", "prompt_embeddings"]
    assert differences == [0.0, 0.0, 0.0]
    assert assembled.was_reloaded
