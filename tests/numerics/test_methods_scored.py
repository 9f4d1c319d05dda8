"""Methods other than LoRA beside a trained score head: full and bottleneck adapters, loaded by their users."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional
from transformers import AutoConfig, AutoModelForSequenceClassification

from coordinator.artifacts.verify_process import Probe, ProbeRows
from edge_node.transport.base import Peer
from plutino.errors import ConfigError
from plutino.job.method import AdaptersConfig, FullConfig
from plutino.job.objective import ClassificationConfig, RegressionConfig
from plutino.job.spec import parse_spec
from plutino.load_adapter import load_adapter
from tests.numerics.objective_cases import CLASSES, batches_for, rows_for
from tests.numerics.pipelines import assert_same_tensors, make_spec, padded, pipeline_of, stages_of, train
from tests.numerics.test_methods import export
from tests.numerics.tiny_families import save_model
from tests.sampling import sampled

CLASSIFY = ClassificationConfig(labels=CLASSES)
OBJECTIVES = {"classification": CLASSIFY, "regression": RegressionConfig()}
METHODS = {"full": FullConfig(), "adapters": AdaptersConfig(placement="houlsby", bottleneck=4)}
# gpt2 ties its head to its embedding, which a score head undoes.
CASES = [(m, f, o) for m in METHODS for f in ("bert", "roberta", "gpt2", "llama") for o in OBJECTIVES]
ALWAYS = (("full", "bert", "regression"), ("full", "gpt2", "classification"), ("adapters", "bert", "classification"))

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def spec_of(folder, method, objective):
    return make_spec(folder).model_copy(update={"method": METHODS[method], "objective": objective})


def scores_of(model, rows):
    ids, _, mask = padded(rows)
    # Where a row ends transformers sees by the pad token, and one by one without any.
    pad = model.config.pad_token_id
    if pad is None:
        lengths = rows.lengths.tolist()
        return torch.cat([model(input_ids=ids[row : row + 1, :length]).logits for row, length in enumerate(lengths)])
    return model(input_ids=ids.masked_fill(mask == 0, pad), attention_mask=mask).logits


def probe_of(objective, rows, loss_sum):
    counted = {"micro_batches": (ProbeRows.of(rows),), "num_counted": len(rows.lengths)}
    return Probe(loss_sum=loss_sum, objective=objective, dtype="fp32", **counted)


@pytest.mark.parametrize(("method", "family", "objective"), sampled(CASES, 3, always=ALWAYS))
def test_what_three_stages_publish_gives_the_pipelines_scores_in_transformers(method, family, objective, tmp_path):
    folder, objective = save_model(family, tmp_path / "base"), OBJECTIVES[objective]
    spec, rows = spec_of(folder, method, objective), rows_for(objective, 77)
    with pipeline_of(spec, stages_of(1)) as pipeline:
        one = train(pipeline, batches_for(objective)), pipeline.state()
    with pipeline_of(spec, stages_of(3)) as pipeline:
        decisions = train(pipeline, batches_for(objective))
        loss_sum, (values,) = pipeline.evaluate_rows(0, [rows])
        assembled, published = export(pipeline, spec, tmp_path / "out", probe_of(objective, rows, loss_sum))

    assert decisions == one[0]
    assert assembled.was_reloaded
    assert_same_tensors(published, one[1])
    staged = Path(assembled.staging_dir)
    if method == "full":
        # Nothing is told but the folder: labels and their number stand in its config.json.
        model = AutoModelForSequenceClassification.from_pretrained(staged).eval()
        assert model.config.architectures == [type(model).__name__]
        labels = list(model.config.id2label.values())
        assert labels == (list(CLASSES) if objective is CLASSIFY else ["LABEL_0"])
    else:
        model = AutoModelForSequenceClassification.from_pretrained(
            folder, num_labels=values.shape[1], ignore_mismatched_sizes=True
        ).eval()
        load_adapter(model, staged)
    with torch.no_grad():
        np.testing.assert_allclose(values.numpy(), scores_of(model, rows).numpy(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", ["bert", pytest.param("roberta", marks=pytest.mark.slow)])
def test_every_weight_of_an_encoder_gets_the_gradient_of_the_unsplit_model(family, tmp_path):
    folder, rows = save_model(family, tmp_path), rows_for(CLASSIFY, 5)
    with pipeline_of(spec_of(folder, "full", CLASSIFY), stages_of(3)) as pipeline:
        start = pipeline.state()
        outcomes = pipeline.train_step(0, [rows], float(len(rows.lengths)))
        found = {name: grad for e in pipeline.executors.values() for name, grad in e._gradients.items()}
    config = AutoConfig.from_pretrained(folder, num_labels=len(CLASSES))
    whole = AutoModelForSequenceClassification.from_config(config).eval()
    whole.load_state_dict(start)  # every name, and no other
    loss = functional.cross_entropy(scores_of(whole, rows), torch.from_numpy(rows.labels).long(), reduction="sum")
    (loss / len(rows.lengths)).backward()

    assert outcomes[Peer(2)].loss_sum == pytest.approx(loss.item(), rel=1e-6)
    expected = {name: parameter.grad for name, parameter in whole.named_parameters()}
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6)


def test_a_score_head_meets_a_model_that_has_none_or_another_number_of_labels(tmp_path):
    folder = save_model("bert", tmp_path / "base")
    spec, rows = spec_of(folder, "adapters", CLASSIFY), rows_for(CLASSIFY, 5)
    with pipeline_of(spec, stages_of(1)) as pipeline:
        probe = probe_of(CLASSIFY, rows, pipeline.evaluate(0, [rows]))
        _, published = export(pipeline, spec, tmp_path / "out", probe)
    (staged,) = tmp_path.glob(".plutino-*")
    assert "base_model.model.classifier.weight" in published
    assert json.loads((staged / "adapter_config.json").read_text())["modules_to_save"] == ["classifier"]
    two = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2, ignore_mismatched_sizes=True)

    with pytest.raises(ConfigError, match=r"has \[3, 32\] where the model has \[2, 32\]; .*num_labels"):
        load_adapter(two, staged)
    del two.classifier
    with pytest.raises(ConfigError, match="the model has no classifier; load the base model with AutoModelForSeq"):
        load_adapter(two, staged)


@pytest.mark.parametrize("method", ["lora", "adapters", "full", "p_tuning_v2"])
def test_a_job_may_classify_with_it(method, tmp_path):
    values = {"model": "m", "data": {"train": "t"}, "objective": {"type": "classification"}}
    assert parse_spec(values | {"method": {"type": method}}, base_dir=tmp_path).method.type == method
    with pytest.raises(ConfigError, match=r"set method\.type: lora, adapters, full or p_tuning_v2"):
        parse_spec(values | {"method": {"type": "prompt"}}, base_dir=tmp_path)
