from __future__ import annotations

from pathlib import Path

import pytest

from edge_node.processors import processor_quota
from edge_node.profile_book import ProfileBook
from partitioner.device import ProfileRequest
from plutino.job.method import LoraConfig

REQUEST = {"config_json": "{}", "threads": 2, "attempt": 0, "is_fresh": False}
FAST, SLOW = {"forward_s": 1.0, "backward_s": 3.0}, {"forward_s": 2.0, "backward_s": 2.0}


def test_book_gives_what_was_kept_before_a_restart(tmp_path: Path) -> None:
    ProfileBook(tmp_path / "p.json", {"cores": ["0"]}).keep(REQUEST, FAST)

    assert ProfileBook(tmp_path / "p.json", {"cores": ["0"]}).find(REQUEST) == FAST


def test_book_another_machine_or_shape_has_no_answer(tmp_path: Path) -> None:
    book = ProfileBook(tmp_path / "p.json", {"cores": ["0"]})
    book.keep(REQUEST, FAST)

    assert book.find({**REQUEST, "threads": 1}) is None
    assert ProfileBook(tmp_path / "p.json", {"cores": ["0", "1"]}).find(REQUEST) is None


def test_book_has_no_answer_of_a_time_when_both_halves_of_a_model_were_one_mean(tmp_path: Path) -> None:
    """The fields of a request are its key, and a source's length is one since a decoder's block has its own seconds."""
    asked = ProfileRequest(
        config_json="{}",
        dtype="fp32",
        micro_batch_rows=2,
        row_tokens=73,
        source_tokens=70,
        label_tokens=8,
        method=LoraConfig(),
        threads=1,
    ).model_dump(mode="json")
    book = ProfileBook(tmp_path / "p.json", {})
    book.keep({name: value for name, value in asked.items() if name != "source_tokens"}, FAST)
    assert book.find(asked) is None

    halves = {**FAST, "decoder_forward_s": 0.1, "decoder_backward_s": 0.2}
    book.keep(asked, halves)
    assert ProfileBook(tmp_path / "p.json", {}).find(asked) == halves


def test_book_later_turn_keeps_the_faster_seconds_and_a_first_one_replaces(tmp_path: Path) -> None:
    book = ProfileBook(tmp_path / "p.json", {})
    book.keep(REQUEST, FAST)
    book.keep({**REQUEST, "attempt": 1, "is_fresh": True}, SLOW)
    assert book.find(REQUEST) == {"forward_s": 1.0, "backward_s": 2.0}

    book.keep(REQUEST, SLOW)
    assert book.find(REQUEST) == SLOW


def test_book_fresh_first_turn_forgets_everything_and_a_later_turn_nothing(tmp_path: Path) -> None:
    book = ProfileBook(tmp_path / "p.json", {})
    other = {**REQUEST, "threads": 1}
    book.keep(REQUEST, FAST)
    book.keep(other, SLOW)

    assert book.find({**REQUEST, "attempt": 1, "is_fresh": True}) is None
    assert book.find(other) == SLOW
    assert book.find({**REQUEST, "is_fresh": True}) is None
    assert ProfileBook(tmp_path / "p.json", {}).find(other) is None


def test_book_answers_grow_old(tmp_path: Path) -> None:
    now = [0.0]
    book = ProfileBook(tmp_path / "p.json", {}, clock=lambda: now[0])
    book.keep(REQUEST, FAST)

    now[0] = 29 * 86400.0
    assert book.find(REQUEST) == FAST
    now[0] = 31 * 86400.0
    assert book.find(REQUEST) is None


def test_book_holds_a_bounded_number_and_drops_the_oldest(tmp_path: Path) -> None:
    book = ProfileBook(tmp_path / "p.json", {}, max_answers=2)
    for threads in range(3):
        book.keep({**REQUEST, "threads": threads}, FAST)

    assert book.find({**REQUEST, "threads": 0}) is None
    assert book.find({**REQUEST, "threads": 1}) == FAST


def test_book_that_cannot_be_read_is_begun_anew(tmp_path: Path) -> None:
    (tmp_path / "p.json").write_text('{"key": {"timings": 3}}')
    book = ProfileBook(tmp_path / "p.json", {})

    assert book.find(REQUEST) is None
    book.keep(REQUEST, FAST)
    assert ProfileBook(tmp_path / "p.json", {}).find(REQUEST) == FAST


@pytest.mark.parametrize("version", [1, 2])
def test_processor_quota_is_the_least_of_the_cgroup_and_those_above_it(tmp_path: Path, version: int) -> None:
    proc, cgroups = tmp_path / "proc", tmp_path / "cgroups"
    root = cgroups if version == 2 else cgroups / "cpu,cpuacct"
    (proc / "self").mkdir(parents=True)
    (proc / "self" / "cgroup").write_text("0::/a/b\n" if version == 2 else "3:memory:/\n1:cpu,cpuacct:/a/b\n0::/\n")
    (root / "a" / "b").mkdir(parents=True)

    def allow(folder: Path, quota: str) -> None:
        if version == 2:
            (folder / "cpu.max").write_text(f"{quota} 100000\n")
        else:
            (folder / "cpu.cfs_quota_us").write_text(f"{quota}\n")
            (folder / "cpu.cfs_period_us").write_text("100000\n")

    allow(root / "a" / "b", "max" if version == 2 else "-1")
    assert processor_quota(proc, cgroups) is None
    allow(root / "a", "50000")
    assert processor_quota(proc, cgroups) == 0.5
    assert processor_quota(tmp_path / "nothing", cgroups) is None
