"""Losses and values against the papers' formulas and against stock transformers, on the whole model."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from edge_node.methods.score_head import SCORE_NAME
from plutino.families import FAMILIES
from tests.numerics.objective_cases import CLASSES, CONFIGS, rows_for
from tests.numerics.pipelines import make_spec, padded, pipeline_of, stages_of

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

SCORED = [("classification", "classes"), ("regression", "numbers"), ("reward", "pairs"), ("reward", "probabilities")]


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def evaluated(model_dir, config, rows, *, trained=None):
    spec = make_spec(model_dir).model_copy(update={"objective": config})
    with pipeline_of(spec, stages_of(2)) as pipeline:
        if trained is not None:
            for executor in pipeline.executors.values():
                executor.method.load(trained)
        loss_sum, values = pipeline.evaluate_rows(0, [rows])
        return loss_sum, values[0].numpy(), pipeline.state()


def shaken(model_dir, config):
    """An adapter that differs from its start in every parameter."""
    _, _, state = evaluated(model_dir, config, rows_for(config, 1))
    generator = torch.Generator().manual_seed(5)
    return {name: value + 0.1 * torch.randn(value.shape, generator=generator) for name, value in state.items()}


@torch.no_grad()
def whole_logps(model_dir, rows, *, average):
    """Log-probability of each row's label tokens under the base model, by transformers, token by token."""
    model = AutoModelForCausalLM.from_pretrained(model_dir).eval()
    ids, labels, mask = padded(rows)
    logps = model(input_ids=ids, attention_mask=mask).logits.double().log_softmax(-1)
    found = []
    for row in range(len(ids)):
        tokens = [float(logps[row, t - 1, ids[row, t]]) for t in range(1, ids.shape[1]) if labels[row, t] != -100]
        found.append(sum(tokens) / (len(tokens) if average else 1))
    return found


@pytest.mark.parametrize("name", CONFIGS["dpo"])
def test_dpo_is_the_papers_formula_of_log_probabilities_computed_one_by_one(model_dirs, name):
    config = CONFIGS["dpo"][name]
    rows = rows_for(config, 3)
    policy = whole_logps(model_dirs["llama"], rows, average=config.average_logps)
    if config.reference == "base":
        # At its start the adapter changes nothing: give it something to compare.
        trained = shaken(model_dirs["llama"], config)
        given = replace(rows, reference_logps=np.array(policy, np.float32))
        # The adapted policy's log-probabilities, out of its implicit rewards against known references.
        by_rows = config.model_copy(update={"reference": "rows"})
        _, values, _ = evaluated(model_dirs["llama"], by_rows, given, trained=trained)
        reference, policy = policy, [p + float(v) / config.beta for p, v in zip(policy, values[:, 0], strict=True)]
        loss_sum, own_values, _ = evaluated(model_dirs["llama"], config, rows, trained=trained)
        np.testing.assert_allclose(own_values, values, atol=2e-5)
        assert np.abs(values).max() > 1e-2
    else:
        reference = rows.reference_logps.tolist()
        loss_sum, _, _ = evaluated(model_dirs["llama"], config, rows)

    expected = 0.0
    for chosen, rejected in ((0, 2), (1, 3)):
        margin = (policy[chosen] - reference[chosen]) - (policy[rejected] - reference[rejected])
        match config.loss:
            case "sigmoid":
                eps = config.label_smoothing
                expected -= (1 - eps) * math.log(sigmoid(config.beta * margin))
                expected -= eps * math.log(sigmoid(-config.beta * margin))
            case "ipo":
                expected += (margin - 1 / (2 * config.beta)) ** 2
            case "hinge":
                expected += max(0.0, 1 - config.beta * margin)
    assert loss_sum == pytest.approx(expected, rel=1e-5, abs=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("model", ["llama", "gpt2"])
@pytest.mark.parametrize(("objective", "name"), SCORED)
def test_scores_and_losses_are_those_of_transformers_own_sequence_classification(model_dirs, model, objective, name):
    config = CONFIGS[objective][name]
    rows = rows_for(config, 4)
    loss_sum, values, state = evaluated(model_dirs[model], config, rows)
    classifier = AutoModelForSequenceClassification.from_pretrained(
        model_dirs[model], num_labels=values.shape[1]
    ).eval()
    classifier.score.weight.copy_(state[SCORE_NAME])
    ids, _, mask = padded(rows)

    logits = classifier(input_ids=ids, attention_mask=mask).logits

    np.testing.assert_allclose(values, logits.numpy(), atol=2e-5, rtol=1e-5)
    scores, labels = logits.double().numpy(), rows.labels
    if objective == "classification":
        terms = [-math.log(np.exp(row[int(k)]) / np.exp(row).sum()) for row, k in zip(scores, labels, strict=True)]
    elif objective == "regression":
        terms = [(float(row[0]) - float(y)) ** 2 for row, y in zip(scores, labels, strict=True)]
    elif name == "pairs":
        pairs = [(scores[0, 0], scores[2, 0]), (scores[1, 0], scores[3, 0])]
        terms = [-math.log(sigmoid(c - r)) + config.center_coefficient * (c + r) ** 2 for c, r in pairs]
    else:
        p = [sigmoid(row[0]) for row in scores]
        terms = [-y * math.log(q) - (1 - y) * math.log(1 - q) for q, y in zip(p, labels.tolist(), strict=True)]
    assert loss_sum == pytest.approx(sum(terms), rel=1e-5)


@torch.no_grad()
def test_a_row_that_ends_with_the_pad_token_is_scored_where_transformers_scores_it(model_dirs):
    config = CONFIGS["classification"]["classes"]
    rows = rows_for(config, 6)
    ids = rows.input_ids.copy()
    ids[rows.lengths[0] - 2 : rows.lengths[0]] = 0  # the model's pad token
    rows = replace(rows, input_ids=ids)
    _, values, state = evaluated(model_dirs["llama"], config, rows)
    classifier = AutoModelForSequenceClassification.from_pretrained(model_dirs["llama"], num_labels=len(CLASSES)).eval()
    classifier.score.weight.copy_(state[SCORE_NAME])
    padded_ids, _, mask = padded(rows)

    logits = classifier(input_ids=padded_ids, attention_mask=mask).logits

    np.testing.assert_allclose(values, logits.numpy(), atol=2e-5, rtol=1e-5)


def test_families_with_a_score_class_are_those_that_transformers_classifies_with():
    from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES as KNOWN

    one_stack = {name: family for name, family in FAMILIES.items() if family.halves is None}
    assert {name for name, family in one_stack.items() if family.score_head} == one_stack.keys() & KNOWN.keys()
