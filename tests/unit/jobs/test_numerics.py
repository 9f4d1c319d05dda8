from __future__ import annotations

from dataclasses import replace

import pytest

from coordinator.jobs.planning import make_numerics
from plutino.families import FAMILIES, family_of
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
