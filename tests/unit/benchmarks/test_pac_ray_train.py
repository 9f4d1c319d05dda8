from __future__ import annotations

import sys
from pathlib import Path

import pytest

from benchmarks.agent_processors import AgentProcess, AgentProcessors
from benchmarks.pac import Turn, main, refusal
from benchmarks.pac_contenders import OURS, RAY_TRAIN, contenders
from benchmarks.pac_figures import RunFigures
from benchmarks.pac_goals import goals_of, table
from benchmarks.pac_ray_train import (
    figures_of_workers,
    import_refusal,
    places_of,
    refuse_long,
    refuse_uneven,
)
from benchmarks.pac_shapes import SHAPES
from plutino.errors import ConfigError

DRIVER = {"cluster_up_at_s": 103.0, "fitted_at_s": 133.0}


def of_worker(losses: list[float], peak: int) -> dict:
    at_s = [[110.0, 114.0, 116.0, 117.0], [118.0, 119.0, 120.0, 121.0], [122.0, 123.0, 123.5, 124.0]]
    times = {"began_at_s": 107.0, "at_s": at_s, "saved_at_s": 130.0}
    return {**times, "losses": losses, "job_bytes": peak - 40, "rss_bytes": peak}


def ray_turn() -> Turn:
    shape = SHAPES["t5-base"]
    found = contenders(shape, num_agents=2)
    return Turn(shape=shape, contender=next(each for each in found if each.kind == "ray train"))


def test_a_ray_runs_seconds_add_up_to_the_saved_adapter_and_its_bytes_are_each_workers():
    told = {"agent0": of_worker([3.0, 2.0], 100), "agent1": of_worker([1.0, 4.0], 140)}

    found = figures_of_workers(told, DRIVER, started_s=100.0, notes=("said",))

    assert (found.total_s, found.begin_s, found.epoch_s, found.end_s) == (30.0, 10.0, (8.0, 4.0, 2.0), 6.0)
    assert found.total_s == found.begin_s + sum(found.epoch_s) + found.end_s
    assert (found.num_steps, found.step_s) == (3, (1.5, 1.0, 0.5))
    assert (found.job_bytes, found.rss_bytes) == ({"agent0": 60, "agent1": 100}, {"agent0": 100, "agent1": 140})
    assert found.losses == (2.0, 3.0)


def test_what_rays_own_start_and_end_took_is_told_beside_the_seconds():
    found = figures_of_workers({"agent0": of_worker([1.0], 100)}, DRIVER, started_s=100.0, notes=("said",))

    said, told = found.notes
    assert said == "said"
    assert "up after 3.0 s and its workers began after 7.0 s" in told
    assert "3.0 s after the adapter was saved" in told


def test_a_worker_of_ray_computes_where_the_agent_of_its_index_would():
    agents = (
        AgentProcess(name="a", budget_bytes=1, threads=2),
        AgentProcess(name="b", budget_bytes=1, threads=1, quota_cores=0.5),
    )
    processors = AgentProcessors(
        agents=agents,
        cores={"a": {3, 2}, "b": {4}},
        own=[0, 1],
        available=[2, 3, 4],
        is_short=False,
        notes=(),
        quota_weight=1,
        quota_period_us=1000,
    )
    quotas = processors.quotas()

    assert list(quotas) == ["b"]
    bounded = quotas["b"].folder
    assert places_of(processors, quotas) == [
        {"cores": [2, 3], "threads": 2, "cgroup": None},
        {"cores": [4], "threads": 1, "cgroup": str(bounded)},
    ]


def test_rows_that_workers_cannot_have_equally_are_refused_with_the_way_out():
    refuse_uneven(16, 4)
    with pytest.raises(ConfigError, match=r"16 rows .* 3 workers .* --batch-size that 3 divides"):
        refuse_uneven(16, 3)


def test_a_folder_whose_sockets_would_have_too_long_paths_is_refused_before_ray_starts():
    refuse_long(Path("/tmp/plutino-pac-abcdefgh"))
    with pytest.raises(ConfigError, match=r"has 61 bytes.*TMPDIR"):
        refuse_long(Path("/" + 60 * "a"))


def test_ray_train_is_refused_with_the_reason_where_it_cannot_be_imported(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    why = import_refusal()

    assert why is not None
    assert why.startswith("Ray Train cannot be imported: ")
    assert refusal(ray_turn(), why_no_ray=why) == why


def test_a_bench_without_ray_prints_why_and_goes_on(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "ray", None)

    status = main(["--quick", "--out", str(tmp_path), "--only", f"{RAY_TRAIN}: lora"])

    printed = capsys.readouterr().out
    assert status == 0
    assert f"quick-decoder, {RAY_TRAIN}: lora: refused: Ray Train cannot be imported" in printed
    assert "0 runs" in printed


def test_ray_train_shares_processors_as_agents_do_and_takes_no_card():
    assert refusal(ray_turn(), has_quota=True) is None
    assert refusal(ray_turn(), device="cuda") == "it is compared on processors"


def ran(total_s: float) -> RunFigures:
    return RunFigures(total_s=total_s, first_epoch_s=1.0, later_epochs_s=(), num_steps=1, step_s=(1.0,))


def test_a_printed_row_says_that_its_gradients_passed_loopback():
    rows = table({OURS: ran(20.0), f"{RAY_TRAIN}: lora": ran(30.0)}, "mrpc", batch_size=16).splitlines()

    assert [row.split("  ")[0] for row in rows[1:]] == [OURS, f"{RAY_TRAIN}: lora, over loopback"]


def test_ray_train_has_every_device_of_the_fleet_and_a_goal_of_its_own():
    goals = goals_of(
        {OURS: ran(20.0), f"{RAY_TRAIN}: lora": ran(30.0)},
        shape="t5-base",
        baselines=["data-parallel: lora"],
        codec_bytes=384.0,
        hidden_size=768,
        task="mrpc",
        batch_size=16,
        num_devices=2,
    )

    assert not ray_turn().contender.uses_one_device
    assert (f"3 epochs, {RAY_TRAIN} + peft on the fleet / ours", 1.5) in [(g.name, g.measured) for g in goals]
