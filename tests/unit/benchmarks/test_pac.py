from __future__ import annotations

import json
from dataclasses import replace

import pytest

from benchmarks.pac import Turn, refusal
from benchmarks.pac_contenders import (
    ALONE,
    FP16_SUMS,
    FULL_PIPELINE,
    LEAVING,
    LORA_SIXTEEN_BITS,
    OURS,
    PAC,
    SIXTEEN_BITS,
    UNCACHED,
    contenders,
    scaling_contenders,
)
from benchmarks.pac_figures import RunFigures, figures_of
from benchmarks.pac_goals import best_baseline, goals_of, scaling_goals, whole_task_s
from benchmarks.pac_run import Order
from benchmarks.pac_shapes import SHAPES, pair_rows
from plutino.events import DataRead, JobStateChanged, PlanChanges, StepCommitted, WorkerName, WorkerStepTimes
from plutino.sizes import GIB

BASELINES = ("data-parallel: lora", "pipeline: lora", FULL_PIPELINE)


def ran(total_s: float, first_epoch_s: float = 10.0, **changes) -> RunFigures:
    values = {"later_epochs_s": (1.0, 1.0), "num_steps": 10, "step_s": (1.0, 0.1, 0.1)}
    return RunFigures(total_s=total_s, first_epoch_s=first_epoch_s, **(values | changes))


def judged(**runs: RunFigures) -> dict[str, tuple[float, bool]]:
    names = {"ours": OURS, "pac": PAC, "alone": ALONE, "uncached": UNCACHED, "full": FULL_PIPELINE, "leaving": LEAVING}
    named = {names.get(key, key): figures for key, figures in runs.items()}
    goals = goals_of(
        named,
        shape="t5-base",
        baselines=BASELINES,
        codec_bytes=384.0,
        hidden_size=768,
        task="mrpc",
        batch_size=16,
        num_devices=4,
    )
    return {goal.name: (pytest.approx(goal.measured), goal.is_met) for goal in goals}


def test_the_headline_is_the_quickest_baseline_over_ours():
    runs = {"data-parallel: lora": ran(60.0), "pipeline: lora": ran(45.0)}

    assert best_baseline({name: each.total_s for name, each in runs.items()}, BASELINES) == "pipeline: lora"
    found = judged(ours=ran(20.0), pac=ran(40.0), alone=ran(150.0), **runs)
    assert found["3 epochs, best baseline (pipeline: lora) / ours"] == (2.25, False)
    assert found["3 epochs, PAC as published / ours"] == (2.0, True)
    assert found["3 epochs, one device with the same method / ours"] == (7.5, False)


def test_what_did_not_run_is_not_judged():
    assert set(judged(pac=ran(40.0))) == {"cache bytes a token and place / hidden size"}


def test_memory_is_judged_beside_the_largest_device_of_full_fine_tuning():
    ours = ran(20.0, job_bytes={"a": GIB, "b": GIB // 2})
    leaving = ran(25.0, cached_job_bytes={"a": GIB // 4})

    found = judged(ours=ours, leaving=leaving, full=ran(50.0, job_bytes={"a": GIB, "b": 5 * GIB}))

    assert found["peak job bytes, first epoch / full fine-tuning"] == (0.2, True)
    assert found["peak job bytes, cached epochs / full fine-tuning"] == (0.05, True)


def test_scaling_is_judged_for_first_and_cached_epochs_apart():
    runs = {"2 equal agents": ran(1.0, step_s=(8.0, 1.0)), "8 equal agents": ran(1.0, step_s=(2.0, 0.5))}
    runs |= {f"alone {n}": ran(1.0, step_s=(8.0 / n, 1.0 / n)) for n in (4, 2, 1)}
    runs["agents of 4:2:1"] = ran(1.0, step_s=(8.0 / 7, 1.0 / 3.5))

    found = {goal.name: goal.measured for goal in scaling_goals(runs)}

    assert list(found.values()) == pytest.approx([1.0, 1.0, 0.5, 0.5])


def test_a_whole_task_takes_what_was_measured_once_and_its_steps_at_the_median():
    figures = ran(30.0, later_epochs_s=(1.0, 1.0), step_s=(2.0, 0.5, 0.5))

    assert whole_task_s(figures, "mrpc", batch_size=3667) == pytest.approx(18.0 + 3.0)


def committed(step: int, plan_epoch: int, seconds: float, peak: int, sent: int) -> StepCommitted:
    times = dict.fromkeys(("total_s", "compute_s", "wait_s", "serialise_s", "commit_s", "rss_bytes"), 0)
    worker = WorkerName(stage_index=0, device_name="a")
    return StepCommitted(
        step=step,
        plan_epoch=plan_epoch,
        loss=1.0,
        grad_norm=1.0,
        clip_scale=1.0,
        lr=1.0,
        tokens=100,
        label_tokens=10,
        seconds=seconds,
        commit_s=0.0,
        workers=(WorkerStepTimes(worker=worker, peak_rss_bytes=peak, sent_bytes=sent, **times),),
    )


def test_a_runs_seconds_add_up_and_its_bytes_are_counted_by_plan():
    state = {"reason": "", "next_step": 0, "total_steps": 4}
    seen = [
        (1.0, DataRead(num_train_rows=8, num_eval_rows=0, total_steps=4)),
        (2.0, JobStateChanged(state="running", **state)),
        (4.0, committed(0, 1, 2.0, 700, 10)),
        (5.0, committed(1, 1, 1.0, 900, 20)),
        (5.5, PlanChanges(step=2, plan_epoch=2, reason="")),
        (7.0, JobStateChanged(state="running", **state)),
        (7.5, committed(2, 2, 0.5, 300, 3)),
        (8.0, committed(3, 2, 0.5, 300, 6)),
        (10.0, JobStateChanged(state="succeeded", **state)),
    ]

    found = figures_of(seen, batch_size=4)

    assert (found.total_s, found.begin_s, found.moves_s, found.end_s) == (10.0, 2.0, (1.5,), 2.0)
    assert found.epoch_s == (3.0, 1.0)
    assert found.rss_bytes == {"a": 900}
    assert found.sent_bytes == {"a": 26}


def test_every_contender_of_a_decoder_is_a_job():
    shape = SHAPES["quick-decoder"]
    turns = [Turn(shape=shape, contender=each) for each in (*contenders(shape, num_agents=2), *scaling_contenders())]

    refused = {turn.contender.name: why for turn in turns if (why := refusal(turn)) is not None}

    assert refused == {}
    assert len({turn.slug for turn in turns}) == len(turns)


def test_sums_are_rounded_for_the_contenders_that_are_named_after_it_alone():
    found = contenders(SHAPES["t5-base"], num_agents=4)

    assert [each.name for each in found if each.sums != "fp32"] == [FP16_SUMS, SIXTEEN_BITS, LORA_SIXTEEN_BITS]


def test_rows_are_those_of_the_task_where_there_is_a_file_and_as_long_where_not(tmp_path):
    (tmp_path / "stsb").mkdir()
    (tmp_path / "stsb" / "train.jsonl").write_text(json.dumps({"s1": "A b", "s2": "c", "score": 3.3}))

    (real,) = pair_rows("stsb", 1, tmp_path)
    drawn = pair_rows("mrpc", 200, tmp_path)

    assert (real.prompt, real.completion) == ("A b = c ?", " 3.2")
    assert sum(len(row.words) for row in drawn) / 200 == pytest.approx(44 + 3, rel=0.1)
    with pytest.raises(ValueError, match="1 rows, 2 are wanted"):
        pair_rows("stsb", 2, tmp_path)


def test_an_order_survives_its_file_and_knows_its_fleet():
    order = Order(
        shape="quick-decoder",
        contender="agents of 4:2:1",
        is_scaling=True,
        model_dir="",
        rows_path="",
        out="",
        cores=(1, 2),
        num_agents=2,
        cores_per_agent=3,
        memory="2GiB",
        rate="1Gbit",
        latency_ms=0.3,
        epochs=3,
        batch_size=8,
        micro_batch_size=None,
        codec="int4",
        device="cpu",
        timeout_s=1.0,
        quota=0.2,
    )

    assert Order.from_json(order.to_json()) == order
    assert [device.threads for device in order.fleet().devices] == [4, 2, 1]
    slow = replace(order, contender="ours, 100 Mbit", is_scaling=False)
    assert slow.fleet().rate == "100Mbit"
    assert [device.threads for device in slow.fleet().devices] == [3, 3]
