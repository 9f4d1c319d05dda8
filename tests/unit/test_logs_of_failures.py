from __future__ import annotations

import os

from tests.logs_of_failures import NUM_SHOWN, SHOWN_BYTES, end_of, logs_below


def test_logs_below_are_those_written_since_then_with_the_newest_first(tmp_path):
    (tmp_path / "state").mkdir()
    for number in range(NUM_SHOWN + 2):
        path = tmp_path / "state" / f"{number}.log"
        path.write_text("said")
        os.utime(path, (100.0 + number, 100.0 + number))
    (tmp_path / "result.json").write_text("{}")

    assert [path.stem for path in logs_below(tmp_path, 103.0)] == ["7", "6", "5", "4", "3"]
    assert len(logs_below(tmp_path, 0.0)) == NUM_SHOWN


def test_end_of_a_log_is_bounded_and_survives_a_cut_character(tmp_path):
    path = tmp_path / "coordinator.log"
    path.write_text("ä" * SHOWN_BYTES + "the end")

    assert end_of(path).endswith("the end")
    assert len(end_of(path)) <= SHOWN_BYTES


def test_failed_test_shows_the_coordinators_log(pytester):
    pytester.makeconftest("pytest_plugins = ['tests.logs_of_failures']")
    pytester.makepyfile(
        """
        def test_it(tmp_path):
            (tmp_path / "coordinator.log").write_text("why")
            assert not tmp_path.is_dir()
        """
    )

    result = pytester.runpytest_inprocess("-p", "no:cacheprovider")

    result.assert_outcomes(failed=1)
    result.stdout.re_match_lines([".*coordinator.log.*", "why"])
