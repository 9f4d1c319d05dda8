from __future__ import annotations

from dataclasses import replace

import pytest

from coordinator.jobs.kept_numerics import in_words
from coordinator.jobs.planning import make_numerics, micro_batch_cut_of
from plutino.families import FAMILIES, family_of
from plutino.job.spec import JobSpec
from plutino.types import AgentId
from tests.unit.jobs.test_eligibility import LAPTOP
from tests.unit.scheduling.test_scheduler import plan_of


@pytest.mark.parametrize("model_type", FAMILIES)
def test_numerics_record_names_the_attention_backend_of_the_family(model_type):
    record = make_numerics(plan_of({LAPTOP.agent_id: 1}), family_of(model_type), [LAPTOP])

    assert record.attention == ("eager" if model_type in ("gemma2", "bloom") else "sdpa")


def test_numerics_record_names_the_borders_that_the_first_plan_rounds_at():
    plan = plan_of({LAPTOP.agent_id: 1, "other": 1})
    first, *rest = plan.stages
    mixed = plan.model_copy(update={"stages": (first.model_copy(update={"codec": "bf16"}), *rest)})
    all_lossy = plan.model_copy(update={"codec": "bf16"})
    family, other = family_of("llama"), replace(LAPTOP, agent_id=AgentId("other"))

    records = [make_numerics(p, family, [LAPTOP, other]) for p in (plan, mixed, all_lossy)]
    beside = make_numerics(all_lossy, family, [LAPTOP, other], is_beside=True)

    assert [(r.codecs, r.bf16_borders) for r in records] == [("raw", ()), ("raw", (1,)), ("raw", (1,))]
    assert (beside.codecs, beside.bf16_borders) == ("bf16", ())


LORA, PROMPT = {"type": "lora"}, {"type": "prompt", "num_virtual_tokens": 4}


@pytest.mark.parametrize(
    ("num_devices_of_stages", "training", "method", "cut"),
    [
        ((2,), {}, LORA, "tokens"),
        ((1,), {}, LORA, "rows"),
        ((1, 1), {}, LORA, "rows"),
        ((2, 1), {}, LORA, "rows"),
        ((2,), {}, PROMPT, "rows"),
        ((2,), {"micro_batch_size": 2}, LORA, "rows"),
        ((2,), {"micro_batch_cut": "rows"}, LORA, "rows"),
        ((1, 1), {"micro_batch_cut": "tokens", "micro_batch_size": 2}, LORA, "tokens"),
    ],
)
def test_micro_batches_have_like_tokens_where_devices_share_the_whole_model_or_the_job_says_so(
    num_devices_of_stages, training, method, cut
):
    names = iter("abcd")
    plan = plan_of({next(names): 1 for _ in num_devices_of_stages})
    stages = [
        stage.model_copy(update={"further_replicas": (stage.replicas[0],) * (number - 1)})
        for stage, number in zip(plan.stages, num_devices_of_stages, strict=True)
    ]
    values = {"model": {"path": "m"}, "data": {"train": "rows.jsonl"}, "method": method, "training": training}

    found = micro_batch_cut_of(plan.model_copy(update={"stages": tuple(stages)}), JobSpec.model_validate(values))

    assert found == cut
    record = make_numerics(plan, family_of("llama"), [LAPTOP, *others(plan)], micro_batch_cut=found)
    assert record.micro_batch_cut == cut
    # A later plan, of one device: what was cut is repeated.
    assert micro_batch_cut_of(plan_of({"a": 1}), JobSpec.model_validate(values), record) == cut
    assert ("like numbers of tokens" in in_words(record)) == (cut == "tokens")


def others(plan):
    return [replace(LAPTOP, agent_id=AgentId(agent_id)) for agent_id in plan.agent_ids]
