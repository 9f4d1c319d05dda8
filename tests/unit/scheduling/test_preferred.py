from __future__ import annotations

import pytest

from coordinator.scheduling.problem import REPLICAS_SHARE, PlanningProblem, preferred
from partitioner.device import LinkProfile, LinkTable
from tests.unit.partitioner.fleet import device, job, llama


def problem(bandwidth_bytes_per_s: float, **changes: object) -> PlanningProblem:
    table = llama(2)
    values = {
        "job_id": "job",
        "table": table,
        "shape": job(table, micro_batch_rows=1),
        "is_micro_batch_free": False,
        "label_tokens_per_row": 1,
        "devices": tuple(device(name, speed=1) for name in "abcd"),
        "links": LinkTable(other=LinkProfile(bandwidth_bytes_per_s=bandwidth_bytes_per_s)),
        "allow_replicas": True,
    }
    return PlanningProblem(**{**values, **changes})


def test_problem_takes_replicas_where_they_save_more_than_their_share():
    fast = problem(1e12)

    plan, alone = fast.plan(), fast.model_copy(update={"allow_replicas": False}).plan()

    assert plan.has_replicas and plan.step_s < alone.step_s * (1 - REPLICAS_SHARE)
    assert any(lost.what == "without replicas" for lost in plan.rejected)


@pytest.mark.parametrize(
    ("num_shared_stages", "num_stages", "saved", "takes_replicas"),
    [
        (2, 2, REPLICAS_SHARE + 0.01, True),
        (2, 2, REPLICAS_SHARE - 0.01, False),
        (1, 1, REPLICAS_SHARE + 0.01, True),
        (1, 1, REPLICAS_SHARE - 0.01, False),
        (1, 2, 0.0, True),
        (1, 2, -0.01, False),
    ],
)
def test_preferred_needs_the_share_but_of_whole_models_against_a_pipeline(
    num_shared_stages, num_stages, saved, takes_replicas
):
    shared, alone = problem(1e12).plan(), problem(1e12, allow_replicas=False).plan()
    assert shared.has_replicas and not alone.has_replicas
    alone = alone.model_copy(update={"stages": (alone.stages[0],) * num_stages})
    of_shared = {"stages": (shared.stages[0],) * num_shared_stages, "step_s": alone.step_s * (1 - saved)}
    shared = shared.model_copy(update=of_shared)

    chosen = preferred(shared, alone)

    assert chosen.has_replicas == takes_replicas
    assert any("replicas" in lost.what for lost in chosen.rejected)
