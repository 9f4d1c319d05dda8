"""The card says what was done, in a form that tools and people can read, whatever the names hold."""

from __future__ import annotations

import ast
from collections.abc import Callable

import pytest
import yaml

from coordinator.artifacts.card import CardFacts, render_card
from plutino.job.method import (
    AdaptersConfig,
    FullConfig,
    LoraConfig,
    MethodConfig,
    ParallelAdaptersConfig,
    PrefixConfig,
    PromptConfig,
    PTuningV2Config,
)
from plutino.job.objective import ObjectiveConfig, RewardConfig, Seq2SeqConfig, SftConfig

MakeFacts = Callable[..., CardFacts]


def front_matter(card: str) -> dict[str, object]:
    _, text, _ = card.split("---\n", 2)
    return yaml.safe_load(text)  # type: ignore[no-any-return]


def test_card_front_matter_is_that_of_a_peft_model(make_facts: MakeFacts) -> None:
    facts = make_facts()

    values = front_matter(render_card(facts, "out"))

    assert values["base_model"] == facts.base_path
    assert values["library_name"] == "peft"
    assert {"lora", "plutino"} <= set(values["tags"])  # type: ignore[call-overload]


@pytest.mark.parametrize(
    "told",
    [
        "largest difference 0 over 3 stages",
        "| training loss, first step | 3.2500 |",
        "| held-out loss after step 30 | 0.6250 |",
        "| parameters trained | 1234 (0.500 % of the base model's) |",
        "| mean reward, first and last 3 of 30 steps | 0.1, 0.5 |",
        "| exact match, base model alone, 40 held-out rows | 0.0 % |",
        "| exact match, with the adapter, 40 held-out rows | 75.0 % |",
        "| training | train.jsonl | 120 | `" + "d" * 64 + "` |",
        "b" * 64,
        "stage 0: blocks 0-3 on a",
        "torch: 2.13.0",
        "2026-01-02",
    ],
)
def test_card_tells_every_fact(told: str, make_facts: MakeFacts) -> None:
    assert told in render_card(make_facts(), "out")


@pytest.mark.parametrize("name", ["out", 'a "quoted" \\ name', "käse"])
def test_card_loading_code_is_python_for_any_folder_name(name: str, make_facts: MakeFacts) -> None:
    code = render_card(make_facts(), name).split("```python\n")[1].split("\n```")[0]

    strings = [node.value for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Constant)]
    assert name in strings


@pytest.mark.parametrize(
    ("method", "objective", "loads", "merges"),
    [
        (LoraConfig(), SftConfig(), "AutoPeftModelForCausalLM.from_pretrained", True),
        (LoraConfig(), Seq2SeqConfig(), "AutoPeftModelForSeq2SeqLM.from_pretrained", True),
        (PrefixConfig(), SftConfig(), "AutoPeftModelForCausalLM.from_pretrained", False),
        (PromptConfig(), SftConfig(), "AutoPeftModelForCausalLM.from_pretrained", False),
        (PTuningV2Config(), RewardConfig(), "AutoModelForSequenceClassification.from_pretrained", False),
        (AdaptersConfig(), SftConfig(), "load_adapter(model", False),
        (ParallelAdaptersConfig(), SftConfig(), "load_adapter(model", False),
        (FullConfig(), SftConfig(), "model = AutoModelForCausalLM.from_pretrained", False),
    ],
    ids=lambda value: getattr(value, "type", ""),
)
def test_card_loads_what_each_method_publishes_and_merges_only_what_can_be(
    method: MethodConfig, objective: ObjectiveConfig, loads: str, merges: bool, make_facts: MakeFacts
) -> None:
    card = render_card(make_facts(method=method, objective=objective), "out")
    code = card.split("```python\n")[1].split("\n```")[0]

    ast.parse(code)
    assert loads in code and ("merge_and_unload" in code) == merges
    # A whole model is no adapter, and needs no base.
    assert method.trains_weights != ("adapter" in card.split("## Settings")[0].replace("load_adapter", "adapter"))


def test_card_names_cannot_break_out_of_their_place(make_facts: MakeFacts) -> None:
    facts = make_facts(job_name="a\n---\n# b", plan_text="```\n# c\n```", base_path='x"\ntags: [evil]')

    card = render_card(facts, "out")

    assert front_matter(card)["base_model"] == 'x"\ntags: [evil]'
    assert "\n# a --- # b\n" in card
    assert "````\n```\n# c\n```\n````" in card


def test_card_without_reload_or_scores_says_so(make_facts: MakeFacts) -> None:
    card = render_card(make_facts(was_reloaded=False, score_before=None, score_after=None), "out")

    assert "never loaded in one place" in card
    assert "No answers were generated" in card


def test_card_with_reload_does_not_claim_less(make_facts: MakeFacts) -> None:
    assert "never loaded in one place" not in render_card(make_facts(), "out")


def test_card_facts_round_trip_as_json(make_facts: MakeFacts) -> None:
    facts = make_facts()

    assert CardFacts.model_validate_json(facts.model_dump_json()) == facts
