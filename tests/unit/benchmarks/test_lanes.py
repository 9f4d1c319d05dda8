"""Jobs beside each other: lanes of their own, errors told, nothing begun when time is up."""

from __future__ import annotations

from benchmarks.lanes import run_in_lanes

MODULE = "tests.unit.benchmarks.lane_case"


def case(name, agents=1, threads=1, **more):
    return {"name": name, "agents": agents, "threads": threads} | more


def run(folder, cases, available, minutes=1.0):
    found = {}
    is_well = run_in_lanes(
        MODULE, cases, folder, available, minutes=minutes, on_figures=lambda c, f: found.update({c["name"]: f})
    )
    return is_well, found


def test_jobs_at_once_have_processors_of_their_own_and_one_too_wide_shares_all(tmp_path):
    is_well, found = run(tmp_path, [case("a", 2), case("b", threads=2), case("wide", 5)], [3, 4, 5, 6])

    assert is_well
    assert found == {"a": {"cores": [[3], [4]]}, "b": {"cores": [[5, 6]]}, "wide": {"cores": []}}
    assert not list(tmp_path.iterdir())


def test_job_that_fails_is_told_with_its_reason_and_the_others_go_on(tmp_path):
    is_well, found = run(tmp_path, [case("bad", fails=True), case("good")], [0])

    assert not is_well
    assert "it does" in found["bad"]["error"]
    assert found["good"] == {"cores": [[0]]}


def test_nothing_begins_when_time_is_up(tmp_path):
    assert run(tmp_path, [case("late")], [0], minutes=0.0) == (False, {})
