"""Jobs whose devices hold no model folder: weights from the coordinator, the cache and each other."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import grpc
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from edge_node.weights_config import WeightsConfig
from plutino.assets import SNIPS_DIR, TINY_LLAMA_DIR
from plutino.errors import PlutinoError
from plutino.job.spec import JobSpec
from plutino.manifest import make_manifest
from plutino.safetensors_index import read_safetensors_headers
from plutino.wire.bulk import BulkClient
from plutino.wire.channel import Lane, sync_channel
from protos import cache_pb2, cache_pb2_grpc
from tests.integration.hub_server import COMMIT, REPOSITORY, FakeHub
from tests.integration.stack import People, ThreadAgent, ThreadCoordinator, losses, make_spec, wait_until

STEPS = 2
REMOTE, LOCAL = ("device0", "device1"), "local"


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=4096,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        (folder / name).write_bytes((TINY_LLAMA_DIR / name).read_bytes())
    return folder


class Fleet:
    """A coordinator, two devices with a cache each and no model folder, and one that reads the folder."""

    def __init__(self, stack: ExitStack, folder: Path) -> None:
        coordinator = ThreadCoordinator(folder / "state")
        stack.callback(coordinator.close)
        self.endpoints = coordinator.endpoints
        self.state_dir = folder / "state"
        self.people = People(self.endpoints.people_address)
        stack.callback(self.people.close)
        self.agents: dict[str, ThreadAgent] = {}
        self._cache_dirs = [folder / name for name in (*REMOTE, LOCAL)]
        for cache_dir in self._cache_dirs:
            weights = WeightsConfig(cache_dir=cache_dir, uses_folders=cache_dir.name == LOCAL)
            agent = ThreadAgent(self.endpoints.devices_address, cache_dir.name, weights=weights)
            stack.callback(agent.close)
            self.agents[agent.name] = agent
        wait_until(lambda: len(self.people.devices()) == len(self.agents), "all agents attached")

    def forget(self, *, keep: str = "") -> None:
        """As :meth:`empty_caches`, but for one device."""
        for cache_dir in self._cache_dirs:
            for folder in () if cache_dir.name == keep else ("blobs", "names"):
                for path in (cache_dir / folder).glob("*/*"):
                    path.unlink()

    def empty_caches(self) -> None:
        """As on devices that have run nothing."""
        for cache_dir in self._cache_dirs:
            for blob in (cache_dir / "blobs").glob("*/*"):
                blob.unlink()

    def run(self, spec: JobSpec) -> tuple[str, list[dict[str, int]]]:
        """Run a job to its end; gives its id, and by worker where its weights came from."""
        job_id = self.people.submit(spec)
        assert self.people.wait(job_id).state == "succeeded", self.people.job(job_id)
        loaded = [event for kind, event in self.people.events(job_id) if kind == "WorkerLoaded"]
        return job_id, [event["bytes_by_place"] for event in loaded]


@pytest.fixture(scope="module")
def running_fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    with ExitStack() as stack:
        yield Fleet(stack, tmp_path_factory.mktemp("fleet"))


@pytest.fixture
def fleet(running_fleet: Fleet) -> Fleet:
    running_fleet.empty_caches()
    return running_fleet


def spec_of(model_dir: Path, output: Path, *, devices: tuple[str, ...] = REMOTE, **training: object) -> JobSpec:
    return make_spec(
        model_dir,
        SNIPS_DIR / "validation.jsonl",
        output,
        training={"steps": STEPS, "batch_size": 4, "micro_batch_size": 2, **training},
        placement={"stages": len(devices), "devices": devices},
        method={"type": "lora", "rank": 4},
    )


def test_devices_without_the_folder_train_the_same_adapter_load_only_their_stages_and_then_from_their_caches(
    fleet, model_dir, tmp_path
):
    _, places = fleet.run(spec_of(model_dir, tmp_path / "over the wire"))
    _, second_places = fleet.run(spec_of(model_dir, tmp_path / "second"))
    _, local_places = fleet.run(spec_of(model_dir, tmp_path / "folder", devices=(LOCAL,)))

    adapter = "adapter_model.safetensors"
    assert (tmp_path / "over the wire" / adapter).read_bytes() == (tmp_path / "folder" / adapter).read_bytes()
    index = read_safetensors_headers(model_dir)
    total_bytes = sum(entry.end - entry.start for entry in index.values())
    embedding = index["model.embed_tokens.weight"]  # tied: both ends hold it
    assert sum(sum(place.values()) for place in places) == total_bytes + embedding.end - embedding.start
    # Norms of a fresh model are all ones: the same bytes are fetched once per device.
    assert sum(place["coordinator"] for place in places) > 0.99 * total_bytes
    assert [set(place) for place in (*second_places, *local_places)] == [{"cache"}, {"cache"}, {"folder"}]


def test_job_of_a_hub_model_pulls_each_stage_from_the_hub_and_names_the_model_in_its_adapter(
    fleet, model_dir, tmp_path, monkeypatch
):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,127.0.0.2")
    with FakeHub(model_dir) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        job_id, places = fleet.run(spec_of(Path(REPOSITORY), tmp_path / "out"))

        assert [set(place) <= {"hub", "cache"} for place in places] == [True, True]
        assert all(place["hub"] > place.get("cache", 0) for place in places)
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == (REPOSITORY, COMMIT)
    assert fleet.people.detail(job_id)["spec"]["model"]["path"] == f"{REPOSITORY}@{COMMIT}"


@pytest.mark.slow
def test_tensors_packed_on_the_coordinator_give_the_same_adapter_for_less_than_half_the_bytes(
    fleet, model_dir, tmp_path
):
    def packed(packed_by: str, name: str, devices: tuple[str, ...] = REMOTE) -> JobSpec:
        spec = spec_of(model_dir, tmp_path / name, devices=devices)
        settings = {
            "quantization": "nf4",
            "quantize_embedding": "int8",
            "quantize_head": "int8",
            "packed_by": packed_by,
        }
        return spec.model_copy(update={"model": spec.model.model_copy(update=settings)})

    _, device_places = fleet.run(packed("devices", "by devices"))
    fleet.forget()
    _, places = fleet.run(packed("coordinator", "by coordinator"))
    _, second_places = fleet.run(packed("coordinator", "again"))

    adapters = [
        (tmp_path / name / "adapter_model.safetensors").read_bytes()
        for name in ("by devices", "by coordinator", "again")
    ]
    assert adapters[0] == adapters[1] == adapters[2]
    from_coordinator = [sum(place.get("coordinator", 0) for place in of_job) for of_job in (device_places, places)]
    assert 0 < from_coordinator[1] < from_coordinator[0] / 2
    assert [set(place) for place in second_places] == [{"cache"}, {"cache"}]
    # Held by their hashes, so that the devices of a job get them from each other too.
    fleet.forget(keep="device0")
    _, shared_places = fleet.run(packed("coordinator", "shared", devices=("device1", "device0")))
    assert any("device device0" in place for place in shared_places)


@pytest.mark.slow
def test_flipped_byte_of_a_packed_tensor_ends_the_job(fleet, model_dir, tmp_path):
    spec = spec_of(model_dir, tmp_path / "out")
    settings = {"quantization": "int8", "packed_by": "coordinator"}
    spec = spec.model_copy(update={"model": spec.model.model_copy(update=settings)})
    fleet.run(spec)
    fleet.forget()
    (packed,) = {path for path in fleet.state_dir.glob("packed/*/packed-00001.safetensors") if _holds_int8(path)}
    entry = read_safetensors_headers(packed.parent)["model.layers.1.mlp.up_proj.int8.codes"]
    status = packed.stat()
    with packed.open("r+b") as file:
        file.seek(entry.start)
        byte = file.read(1)[0]
        file.seek(entry.start)
        file.write(bytes([byte ^ 1]))
    os.utime(packed, ns=(status.st_mtime_ns, status.st_mtime_ns))

    summary = fleet.people.wait(fleet.people.submit(spec_of_packed(spec, tmp_path / "second")))

    assert summary.state == "failed"
    assert "model.layers.1.mlp.up_proj.int8.codes came twice" in summary.reason


def _holds_int8(path: Path) -> bool:
    return "model.layers.1.mlp.up_proj.int8.codes" in read_safetensors_headers(path.parent)


def spec_of_packed(spec: JobSpec, output: Path) -> JobSpec:
    return spec.model_copy(update={"output": spec.output.model_copy(update={"dir": str(output)})})


def test_device_gets_from_another_one_of_the_job_what_that_has_and_nobody_else_does(fleet, model_dir, tmp_path):
    fleet.run(spec_of(model_dir, tmp_path / "alone", devices=("device0",)))

    job_id, places = fleet.run(spec_of(model_dir, tmp_path / "both"))

    assert sorted(set(place) - {"cache"} for place in places) == [set(), {"device device0"}]
    # Closed to other jobs and other names.
    assignment = fleet.agents["device0"].assignments[-1]
    (other,) = assignment.caches
    channel = sync_channel(other.address, Lane.BULK)
    try:
        stub = cache_pb2_grpc.CacheServiceStub(channel)
        for job, sha256, code in (
            ("other-job", assignment.manifest_sha256, grpc.StatusCode.NOT_FOUND),
            (job_id, "../../secret", grpc.StatusCode.INVALID_ARGUMENT),
            (job_id, "0" * 64, grpc.StatusCode.INVALID_ARGUMENT),
        ):
            request = cache_pb2.GetBlobRequest(job_id=job, sha256=sha256)
            with pytest.raises(grpc.RpcError) as caught:
                list(stub.GetBlob(request, timeout=20))
            assert caught.value.code() is code
        assert stub.Holds(cache_pb2.HoldsRequest(job_id=job_id, sha256=assignment.manifest_sha256), timeout=20).holds
        with pytest.raises(grpc.RpcError, match="needs a deadline"):
            list(stub.GetBlob(cache_pb2.GetBlobRequest(job_id=job_id, sha256="0" * 64)))
    finally:
        channel.close()


def test_flipped_byte_in_the_coordinators_file_ends_the_job_and_nothing_is_trained(fleet, model_dir, tmp_path):
    """The manifest was made of the whole file; then a byte of it changes without a new time stamp, as on a bad disk."""
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in model_dir.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    weights = copy / "model.safetensors"
    entry = read_safetensors_headers(copy)["model.layers.1.mlp.up_proj.weight"]
    os.utime(weights, (1_000_000_000, 1_000_000_000))  # nothing is remembered of a file that was just written
    make_manifest(copy)
    data = bytearray(weights.read_bytes())
    data[entry.start] ^= 1
    with weights.open("r+b") as file:
        file.write(data)
    os.utime(weights, (1_000_000_000, 1_000_000_000))

    job_id = fleet.people.submit(spec_of(copy, tmp_path / "second"))
    summary = fleet.people.wait(job_id)

    assert summary.state == "failed"
    assert "model.layers.1.mlp.up_proj.weight came twice with bytes that are not the coordinator's" in summary.reason
    assert losses(fleet.people.detail(job_id)) == []


def test_steps_are_committed_while_the_bulk_process_serves_as_fast_as_it_can(fleet, model_dir, tmp_path):
    """The streams that saturate it run before the first step and still after the last."""
    stopping, streamed = threading.Event(), [0, 0, 0, 0]
    job_id = fleet.people.submit(spec_of(model_dir, tmp_path / "out", steps=8))
    fleet.people.wait_for_step(job_id, 1)
    size_bytes = (model_dir / "model.safetensors").stat().st_size

    def saturate(number: int) -> None:
        with BulkClient(fleet.endpoints.bulk_address) as client:
            while not stopping.is_set():
                try:
                    for piece in client.stream_range(job_id, "model.safetensors", 0, size_bytes):
                        streamed[number] += len(piece)
                except PlutinoError:
                    return  # the assertion below sees it

    threads = [threading.Thread(target=saturate, args=(number,)) for number in range(len(streamed))]
    for thread in threads:
        thread.start()
    try:
        wait_until(lambda: all(streamed), "every stream runs")
        begun_at = fleet.people.job(job_id).step
        assert fleet.people.wait(job_id).state == "succeeded", fleet.people.job(job_id)
        during = list(streamed)
        wait_until(lambda: all(now > then for now, then in zip(streamed, during, strict=True)), "the streams still run")
    finally:
        stopping.set()
        for thread in threads:
            thread.join(20)

    assert begun_at < 8
    lost = [kind for kind, _ in fleet.people.events(job_id) if kind in ("WorkerLost", "Recovering", "StepSkipped")]
    assert lost == []
