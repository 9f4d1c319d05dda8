from __future__ import annotations

import json

from benchmarks.memory import (
    CaseMemory,
    StageMemory,
    memory_document,
    memory_goals,
    memory_table,
    quick_case,
    tight_budgets_bytes,
)
from partitioner.plan import MemoryItem, Plan, StagePlan
from plutino.sizes import MIB


def stage_plan(index, items_mib):
    items = tuple(MemoryItem(name=name, bytes=size * MIB, why="") for name, size in items_mib.items())
    return StagePlan(
        stage_index=index,
        start_block=index,
        end_block=index + 1,
        agent_ids=("a",),
        device_names=("a",),
        forward_s=1.0,
        backward_s=1.0,
        memory=items,
        job_bytes=sum(item.bytes for item in items),
        baseline_bytes=400 * MIB,
        budget_bytes=9000 * MIB,
        threads=1,
    )


def plan(*stages):
    return Plan(
        stages=stages,
        micro_batch_rows=2,
        num_micro_batches=2,
        micro_batch_owners=((0, 0),) * len(stages),
        checkpointing=False,
        dtype="fp32",
        codec="raw",
        step_s=1.0,
        bubble_share=0.0,
        bottleneck="",
        relief="",
    )


def measured(job_mib, *, predicted_mib=400, supervisor_mib=40):
    stage = StageMemory(
        stage_index=0,
        device_name="a",
        start_block=0,
        end_block=4,
        baseline_bytes=400 * MIB,
        predicted_job_bytes=predicted_mib * MIB,
        peak_rss_bytes=(400 + job_mib) * MIB,
        budget_bytes=900 * MIB,
        keeps_heap=False,
        items_bytes={"weights": predicted_mib * MIB},
    )
    return CaseMemory(case=quick_case(), stages=(stage,), supervisors_rss_bytes={"a": supervisor_mib * MIB})


def test_tight_budgets_roomy_plan_leave_no_room_to_keep_the_heap():
    budgets = tight_budgets_bytes(plan(stage_plan(0, {"weights": 300, "heap reuse": 200})))

    assert budgets == [400 * MIB + int(1.03 * 300 * MIB)]


def test_memory_goals_stage_above_its_prediction_is_missed():
    within, above, supervisor, help_ = memory_goals([measured(380), measured(404, supervisor_mib=90)], help_s=0.2)

    assert (within.is_met, above.is_met, supervisor.is_met, help_.is_met) == (True, False, False, True)


def test_memory_document_is_json_with_measured_beside_predicted():
    document = json.loads(json.dumps(memory_document([measured(380)], help_s=0.2)))

    (stage,) = document["cases"][0]["stages"]
    assert (stage["measured_job_bytes"], stage["predicted_job_bytes"]) == (380 * MIB, 400 * MIB)
    assert stage["ratio"] == 0.95


def test_memory_table_small_stage_is_marked():
    large, small = memory_table([measured(380), measured(100, predicted_mib=110)]).splitlines()[1:]

    assert "0.95" in large and "too small" not in large
    assert "too small" in small
