from __future__ import annotations

from partitioner.explain import explain
from partitioner.search import search
from plutino.sizes import MIB
from tests.unit.partitioner.fleet import device, job, llama


def two_stage_plan():
    table = llama(6)
    devices = [device("tablet", available_mib=420), device("laptop", speed=2), device("snail", speed=0.01)]
    return search(table, job(table), devices)


def test_explain_has_a_line_for_every_stage_with_its_sum():
    plan = two_stage_plan()
    lines = explain(plan).splitlines()

    for stage in plan.stages:
        (line,) = [line for line in lines if line.startswith(f"{stage.stage_index}  ")]
        assert stage.device_names[0] in line and f"[{stage.start_block}, {stage.end_block})" in line
        assert f"= {stage.peak_bytes / MIB:.0f} MiB" in line and f"of {stage.budget_bytes / MIB:.0f} MiB" in line


def test_explain_itemises_every_byte_of_the_plan():
    plan = two_stage_plan()
    text = explain(plan)

    for item in {item.name for stage in plan.stages for item in stage.memory}:
        assert f"\n{item} " in text


def test_explain_tells_bottleneck_relief_and_what_lost():
    plan = two_stage_plan()
    text = explain(plan)

    assert plan.bottleneck in text and plan.relief in text
    assert f"step {plan.step_s:.3g} s, bubble {plan.bubble_share:.0%}" in text
    assert "rejected:\n" in text and "unused devices:\n  snail: " in text


def test_explain_has_no_trailing_spaces_and_leaves_empty_sections_out():
    table = llama(2)
    text = explain(search(table, job(table, checkpointing="off"), [device("one")]))

    assert all(line == line.rstrip() for line in text.splitlines())
    assert "unused devices" not in text
