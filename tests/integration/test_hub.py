"""The hub's protocol over real HTTP: ranges, redirects, tokens, refusals, and what resumes after them."""

from __future__ import annotations

import hashlib
import logging
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from coordinator.weights import hub_models
from coordinator.weights.hub_models import fetch_weights, origin_of, pin_model
from edge_node.cache import BlobCache
from edge_node.sources.hub import HubSource
from edge_node.sources.shared import SharedWeights
from plutino.errors import ModelError
from plutino.hub import HubClient, HubError, find_token
from plutino.hub_id import HubId, index_folder, model_folder
from plutino.job.model import ModelConfig
from plutino.manifest import HubOrigin, make_manifest
from plutino.safetensors_index import read_safetensors_headers
from tests.integration.hub_server import COMMIT, REPOSITORY, TOKEN, FakeHub
from tests.unit.sources.test_shared import FakeSource

HUB_ID = HubId(REPOSITORY, COMMIT)
TENSORS = {name: np.arange(1000, dtype=np.float32) + number for number, name in enumerate("abcd")}
FILE = "model.safetensors"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("on the hub")
    (path / "config.json").write_text('{"model_type": "llama"}')
    (path / "tokenizer.json").write_text("{}")
    (path / "pytorch_model.bin").write_bytes(b"never fetched")
    save_file(TENSORS, path / FILE)
    return path


@pytest.fixture(autouse=True)
def _own_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,127.0.0.2")


@pytest.fixture
def hub(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    with FakeHub(folder) as running:
        monkeypatch.setenv("HF_ENDPOINT", running.endpoint)
        yield running


def read(client: HubClient, start: int = 100, end: int = 3000) -> bytes:
    return b"".join(client.stream(HUB_ID, FILE, start, end))


def test_range_comes_through_the_redirect_and_no_other_byte(hub, folder):
    assert read(HubClient()) == (folder / FILE).read_bytes()[100:3000]
    assert hub.requests[-1] == ("store", FILE, "bytes=100-2999")


def test_token_goes_to_the_hub_and_not_to_the_store_nor_into_logs_and_errors(hub, folder, monkeypatch, caplog):
    hub.is_gated = True
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    caplog.set_level(logging.DEBUG)
    hub.faults = {FILE: ["500"] * 5}

    with pytest.raises(HubError) as caught:
        read(HubClient(sleep=lambda _: None))
    assert read(HubClient()) == (folder / FILE).read_bytes()[100:3000]

    assert set(hub.store_tokens) == {None}
    assert TOKEN not in caplog.text + str(caught.value) + repr(HubClient().__dict__)
    assert "topsecret" not in str(caught.value)


def test_token_of_the_login_file_is_found_and_the_environment_wins(tmp_path, monkeypatch):
    assert find_token() is None
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf/token").write_text("from file\n")
    assert find_token() == "from file"
    monkeypatch.setenv("HF_TOKEN", "from environment")
    assert find_token() == "from environment"


@pytest.mark.parametrize(
    ("token", "status", "told"),
    [(None, 401, "set HF_TOKEN"), ("hf_other", 403, "accept the model's terms")],
    ids=["no token", "another account's"],
)
def test_gated_model_is_refused_with_the_way_to_a_token(hub, token, status, told):
    hub.is_gated = True

    with pytest.raises(HubError, match=rf"status {status}.*{told}") as caught:
        HubClient(token=token).describe(HubId(REPOSITORY))

    assert caught.value.is_final


def test_unknown_model_and_unknown_file_are_told(hub):
    with pytest.raises(HubError, match=r"status 404.*model\.path"):
        HubClient().describe(HubId("org/other"))
    with pytest.raises(HubError, match=r"other\.safetensors of .* with status 404"):
        list(HubClient().stream(HUB_ID, "other.safetensors", 0, 1))


@pytest.mark.parametrize(
    ("faults", "slept"),
    [(["429 7", "429 3"], [7.0, 3.0]), (["500", "503"], None)],
    ids=["retry-after is honoured", "backoff"],
)
def test_passing_refusals_are_waited_out(hub, folder, faults, slept):
    hub.faults = {f"resolve {FILE}": list(faults)}
    waited: list[float] = []

    assert read(HubClient(sleep=waited.append)) == (folder / FILE).read_bytes()[100:3000]

    assert len(waited) == 2
    assert waited == slept or (slept is None and waited[0] < waited[1])


def test_pause_longer_than_the_bound_is_not_waited_for(hub):
    hub.faults = {f"resolve {FILE}": ["429 3600"]}
    waited: list[float] = []

    with pytest.raises(HubError, match="asks for a pause of 3600 s") as caught:
        read(HubClient(sleep=waited.append))

    assert (waited, caught.value.is_final) == ([], True)


def test_server_that_keeps_failing_is_given_up(hub):
    hub.faults = {f"resolve {FILE}": ["500"] * 5}

    with pytest.raises(HubError, match="status 500: it failed 5 times"):
        read(HubClient(sleep=lambda _: None))


def test_server_without_ranges_is_refused_before_a_byte_is_used(hub):
    hub.faults = {FILE: ["no ranges"]}

    with pytest.raises(HubError, match="serves no ranges"):
        read(HubClient())


def test_server_that_stalls_is_given_up_as_silent(hub):
    hub.faults = {FILE: ["stalls"]}

    with pytest.raises(HubError, match=r"sent nothing for 0\.2 s") as caught:
        read(HubClient(stalled_after_s=0.2))

    assert caught.value.is_silent


def test_hub_out_of_reach_is_told_as_silent():
    with pytest.raises(HubError, match="cannot be reached") as caught:
        read(HubClient("http://127.0.0.1:9"))

    assert caught.value.is_silent


# ---- a device ----


@pytest.mark.parametrize(
    ("faults", "places"),
    [
        ([], {"hub": 4000}),
        (["breaks"], {"hub": 4000}),
        (["flip"], {"coordinator": 4000}),
        (["stalls"], {"hub": 2000, "coordinator": 2000}),
        (["500"] * 15, {"coordinator": 4000}),
        (["404"], {"coordinator": 4000}),
    ],
    ids=["well", "breaks off", "flipped byte", "stalls", "500", "404"],
)
def test_device_gets_its_tensor_whatever_the_hub_does(hub, folder, tmp_path, faults, places):
    hub.faults = {FILE: faults}
    manifest = make_manifest(folder, origin=HubOrigin(REPOSITORY, COMMIT))
    source = HubSource(manifest.origin, make_client=lambda: HubClient(sleep=lambda _: None, stalled_after_s=0.3))
    weights = SharedWeights(manifest, cache=BlobCache(tmp_path / "cache"), sources=[source, FakeSource("coordinator")])
    try:
        read_back = weights.read("b", torch.float32).numpy()
    finally:
        weights.close()

    assert read_back.tobytes() == TENSORS["b"].tobytes()
    assert weights.progress.by_place == places


def test_device_asks_the_hub_for_its_own_tensors_alone(hub, folder, tmp_path):
    manifest = make_manifest(folder, origin=HubOrigin(REPOSITORY, COMMIT))
    weights = SharedWeights(manifest, cache=BlobCache(tmp_path / "cache"), sources=[HubSource(manifest.origin)])
    try:
        weights.prepare("bd")
        weights.read("b", torch.float32)
        weights.read("d", torch.float32)
    finally:
        weights.close()

    assert hub.asked_bytes() == 2 * 4000


# ---- the coordinator ----


def test_pinning_fetches_what_planning_needs_and_no_weight_byte(hub, folder):
    model = pin_model(ModelConfig(path=REPOSITORY))

    assert model.path == f"{REPOSITORY}@{COMMIT}"
    assert origin_of(model) == HubOrigin(REPOSITORY, COMMIT)
    copy = model_folder(model.path)
    assert read_safetensors_headers(index_folder(copy)) == read_safetensors_headers(folder)
    assert (copy / "tokenizer.json").is_file() and not (copy / "pytorch_model.bin").exists()
    header_bytes = min(entry.start for entry in read_safetensors_headers(folder).values())
    assert hub.asked_bytes() == header_bytes


def test_pinning_a_pinned_model_again_asks_nobody(hub):
    model = pin_model(ModelConfig(path=REPOSITORY))
    hub.requests.clear()

    assert pin_model(model) == model
    assert hub.requests == []


def test_folder_is_neither_pinned_nor_fetched(folder):
    model = ModelConfig(path=str(folder))

    assert pin_model(model) == model
    assert fetch_weights(model) == folder


def test_model_without_safetensors_is_refused_with_the_way_out(tmp_path, monkeypatch):
    (tmp_path / "old").mkdir()
    (tmp_path / "old/config.json").write_text("{}")
    (tmp_path / "old/pytorch_model.bin").write_bytes(b"pickled")
    with FakeHub(tmp_path / "old") as old:
        monkeypatch.setenv("HF_ENDPOINT", old.endpoint)
        with pytest.raises(ModelError, match=r"no safetensors weights \(only pytorch_model\.bin\)"):
            pin_model(ModelConfig(path=REPOSITORY))


def test_fetched_weights_are_the_hubs_and_the_folder_is_whole(hub, folder):
    model = pin_model(ModelConfig(path=REPOSITORY))
    told: list[tuple[int, int]] = []

    copy = fetch_weights(model, on_fetched=lambda done, total: told.append((done, total)))

    size = (folder / FILE).stat().st_size
    assert (copy / FILE).read_bytes() == (folder / FILE).read_bytes()
    assert make_manifest(copy) == make_manifest(folder)
    assert (told[-1], index_folder(copy)) == ((size, size), copy)
    hub.requests.clear()
    assert fetch_weights(model) == copy
    assert hub.requests == []


def test_fetching_goes_on_where_a_broken_transfer_stopped(hub, folder):
    model = pin_model(ModelConfig(path=REPOSITORY))
    hub.requests.clear()
    hub.faults = {FILE: ["breaks"]}

    fetch_weights(model)

    size = (folder / FILE).stat().st_size
    assert [span for kind, _, span in hub.requests if kind == "store"] == [
        f"bytes=0-{size - 1}",
        f"bytes={size // 2}-{size - 1}",
    ]


def test_stopped_fetching_is_gone_on_with_by_the_next(hub, folder):
    model = pin_model(ModelConfig(path=REPOSITORY))
    stop = threading.Event()
    hub.faults = {FILE: ["breaks"]}
    with pytest.raises(ModelError, match="the next job goes on with it"):
        fetch_weights(model, on_fetched=lambda *_: stop.set(), stop=stop)
    part = model_folder(model.path) / f"{FILE}.part"
    here_bytes = part.stat().st_size
    assert 0 < here_bytes < (folder / FILE).stat().st_size
    hub.requests.clear()

    fetch_weights(model)

    assert hub.requests[-1][2] == f"bytes={here_bytes}-{(folder / FILE).stat().st_size - 1}"


def test_flipped_byte_is_found_dropped_and_told(hub, folder):
    model = pin_model(ModelConfig(path=REPOSITORY))
    hub.faults = {FILE: ["flip"]}
    with pytest.raises(ModelError, match="it was dropped: submit the job again"):
        fetch_weights(model)
    assert not list(model_folder(model.path).glob("*.part"))

    found = hashlib.sha256((fetch_weights(model) / FILE).read_bytes())
    assert found.digest() == hashlib.sha256((folder / FILE).read_bytes()).digest()


def test_disk_without_room_is_told_before_anything_is_fetched(hub, monkeypatch):
    model = pin_model(ModelConfig(path=REPOSITORY))
    hub.requests.clear()
    monkeypatch.setattr(hub_models.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000}))

    with pytest.raises(ModelError, match=r"weights need 15\.9 KiB more, the disk of .* has 1000 B free"):
        fetch_weights(model)

    assert hub.files_asked() == []
