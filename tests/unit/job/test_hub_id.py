from __future__ import annotations

from pathlib import Path

import pytest

from plutino.hub_id import HubId, parse_hub_id
from plutino.job.spec import parse_spec


@pytest.mark.parametrize(
    ("path", "hub_id"),
    [
        ("org/name", HubId("org/name", "main")),
        ("Qwen/Qwen3-0.6B@v1.0", HubId("Qwen/Qwen3-0.6B", "v1.0")),
        ("org/name@refs/pr/1", HubId("org/name", "refs/pr/1")),
        ("/org/name", None),
        ("./org/name", None),
        ("~/name", None),
        ("name", None),
        ("a/b/c", None),
        ("org/..", None),
        ("org/na..me", None),
        ("org/name@../x", None),
    ],
)
def test_hub_id_is_told_from_a_path(path, hub_id):
    assert parse_hub_id(path) == hub_id


def test_spec_keeps_a_hub_id_but_a_folder_of_that_name_wins(tmp_path: Path):
    values = {"model": "org/name", "data": {"train": "train.jsonl"}}
    assert parse_spec(values, base_dir=tmp_path).model.path == "org/name"

    (tmp_path / "org/name").mkdir(parents=True)
    assert parse_spec(values, base_dir=tmp_path).model.path == str(tmp_path / "org/name")
