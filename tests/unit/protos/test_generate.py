from __future__ import annotations

import pytest

from protos.generate import PACKAGE_DIR, generate, stale_files


@pytest.fixture
def fresh_and_committed(tmp_path):
    fresh, committed = tmp_path / "fresh", tmp_path / "committed"
    for directory in (fresh, committed):
        directory.mkdir()
        (directory / "jobs_pb2.py").write_text("generated")
    return fresh, committed


def test_stale_files_equal_directories_gives_none(fresh_and_committed):
    assert stale_files(*fresh_and_committed) == []


@pytest.mark.parametrize("side", [0, 1], ids=["not generated yet", "its proto is gone"])
def test_stale_files_file_on_one_side_only_is_named(fresh_and_committed, side):
    (fresh_and_committed[side] / "bulk_pb2_grpc.py").write_text("generated")

    assert stale_files(*fresh_and_committed) == ["bulk_pb2_grpc.py"]


def test_stale_files_changed_file_is_named(fresh_and_committed):
    (fresh_and_committed[1] / "jobs_pb2.py").write_text("edited by hand")

    assert stale_files(*fresh_and_committed) == ["jobs_pb2.py"]


def test_generate_committed_protos_gives_the_committed_code(tmp_path):
    status = generate(tmp_path)

    assert status == 0
    assert stale_files(tmp_path / PACKAGE_DIR.name, PACKAGE_DIR) == []
