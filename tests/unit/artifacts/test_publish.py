"""Publishing: whole or not at all, never over a foreign folder, and repeatable after a crash at any line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from coordinator.artifacts.card import CardFacts
from coordinator.artifacts.publish import PublishedAdapter, PublishRequest, publish_adapter, staging_dir_of
from coordinator.artifacts.shadows import file_sha256
from plutino.errors import ConfigError, ExportError

Stage = Callable[..., PublishRequest]


@pytest.fixture
def stage(tmp_path: Path, make_facts: Callable[..., CardFacts]) -> Stage:
    """Stages an adapter with the given content and gives the request that publishes it."""

    def make(content: bytes = b"first", *, job_id: str = "j1", output: str = "out") -> PublishRequest:
        output_dir = tmp_path / output
        staging_dir = staging_dir_of(output_dir, job_id)
        staging_dir.mkdir()
        (staging_dir / "adapter_model.safetensors").write_bytes(content)
        (staging_dir / "adapter_config.json").write_text("{}")
        return PublishRequest(
            job_id=job_id,
            step=30,
            staging_dir=str(staging_dir),
            output_dir=str(output_dir),
            adapter_sha256=file_sha256(staging_dir / "adapter_model.safetensors"),
            card=make_facts(),
        )

    return make


def content_of(folder: Path) -> bytes:
    return (folder / "adapter_model.safetensors").read_bytes()


def test_publish_makes_the_whole_folder_visible_and_leaves_nothing_beside_it(stage: Stage, tmp_path: Path) -> None:
    request = stage(b"first")

    published = publish_adapter(request)

    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "adapter_model.safetensors",
        "adapter_config.json",
        "README.md",
        "plutino.json",
    }
    assert published == PublishedAdapter(
        output_dir=str(tmp_path / "out"), step=30, adapter_sha256=request.adapter_sha256, adapter_bytes=5
    )


def test_publish_record_tells_job_step_hashes_and_facts(stage: Stage, tmp_path: Path) -> None:
    request = stage()

    publish_adapter(request)

    record = json.loads((tmp_path / "out" / "plutino.json").read_text())
    assert (record["job_id"], record["step"]) == ("j1", 30)
    assert record["sha256"]["adapter_model.safetensors"] == request.adapter_sha256
    assert CardFacts.model_validate(record["facts"]) == request.card


def test_publish_request_round_trips_as_json(stage: Stage) -> None:
    request = stage()

    assert PublishRequest.model_validate_json(request.model_dump_json()) == request


def test_publish_repeated_gives_the_same_answer(stage: Stage, tmp_path: Path) -> None:
    request = stage()

    assert publish_adapter(request) == publish_adapter(request)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_publish_replaces_an_earlier_result_of_the_same_job(stage: Stage, tmp_path: Path) -> None:
    publish_adapter(stage(b"first"))

    publish_adapter(stage(b"second"))

    assert content_of(tmp_path / "out") == b"second"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_publish_over_another_jobs_result_is_refused_and_both_stay(stage: Stage, tmp_path: Path) -> None:
    publish_adapter(stage(b"theirs", job_id="j0"))
    request = stage(b"mine")

    with pytest.raises(ConfigError, match="out is the result of job j0, not an earlier one of job j1"):
        publish_adapter(request)

    assert content_of(tmp_path / "out") == b"theirs"
    assert content_of(Path(request.staging_dir)) == b"mine"


@pytest.mark.parametrize("kind", ["empty folder", "folder", "file", "symlink", "broken record"])
def test_publish_over_anything_foreign_is_refused(kind: str, stage: Stage, tmp_path: Path) -> None:
    output = tmp_path / "out"
    if kind == "file":
        output.write_text("x")
    elif kind == "symlink":
        output.symlink_to(tmp_path)
    else:
        output.mkdir()
        if kind != "empty folder":
            (output / ("plutino.json" if kind == "broken record" else "notes.txt")).write_text('["j1"]')

    with pytest.raises(ConfigError, match=r"out .*nothing was published: set output\.dir"):
        publish_adapter(stage())


def test_publish_of_a_file_that_changed_since_it_was_verified_is_refused(stage: Stage, tmp_path: Path) -> None:
    request = stage()
    (Path(request.staging_dir) / "adapter_model.safetensors").write_bytes(b"other")

    with pytest.raises(ExportError, match="something changed the staged file"):
        publish_adapter(request)

    assert not (tmp_path / "out").exists()


def test_publish_with_nothing_staged_is_refused(stage: Stage, tmp_path: Path) -> None:
    request = stage()
    Path(request.staging_dir).rename(tmp_path / "lost")

    with pytest.raises(ExportError, match="no adapter of job j1 is staged"):
        publish_adapter(request)


def test_publish_after_a_crash_between_the_two_renames_goes_on(stage: Stage, tmp_path: Path) -> None:
    publish_adapter(stage(b"first"))
    request = stage(b"second")
    (tmp_path / "out").rename(tmp_path / ".plutino-j1-previous")

    publish_adapter(request)

    assert content_of(tmp_path / "out") == b"second"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_publish_after_a_crash_before_the_earlier_result_was_removed_removes_it(stage: Stage, tmp_path: Path) -> None:
    request = stage()
    publish_adapter(request)
    (tmp_path / ".plutino-j1-previous").mkdir()

    publish_adapter(request)

    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_publish_after_a_crash_that_lost_the_staging_puts_the_earlier_result_back(stage: Stage, tmp_path: Path) -> None:
    publish_adapter(stage(b"first"))
    request = stage(b"second")
    (tmp_path / "out").rename(tmp_path / ".plutino-j1-previous")
    Path(request.staging_dir).rename(tmp_path / "lost")

    with pytest.raises(ExportError, match="no adapter of job j1 is staged"):
        publish_adapter(request)

    assert content_of(tmp_path / "out") == b"first"


def test_publish_when_the_last_rename_fails_puts_the_earlier_result_back(
    stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish_adapter(stage(b"first"))
    request = stage(b"second")
    rename = Path.rename

    def failing(path: Path, target: Path) -> Path:
        if path == Path(request.staging_dir):
            raise PermissionError(13, "Permission denied")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", failing)

    with pytest.raises(ExportError, match=r"cannot be published at .*Permission denied"):
        publish_adapter(request)

    assert content_of(tmp_path / "out") == b"first"
