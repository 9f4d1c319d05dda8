"""The bulk service and its client over real gRPC, in process where no process has to die."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import grpc
import numpy as np
import pytest
from safetensors.numpy import save_file

from coordinator.artifacts.shadows import ShadowStore
from coordinator.weights.bulk import BulkService, serve
from coordinator.weights.model_files import offer_model, register_model
from coordinator.weights.rate import TokenBucket
from plutino.errors import ConfigError, FrameError, JobError, ModelError, UnknownJobError, UnreachableError
from plutino.manifest import Manifest
from plutino.wire.bulk import BulkClient
from plutino.wire.chunks import CHUNK_BYTES
from protos import bulk_pb2, bulk_pb2_grpc

ROOT = Path(__file__).resolve().parents[2]
WAIT_S = 20.0
SHADOW = bytes(range(256)) * (10 * 1024)  # 2.5 MiB: three chunks, the last one short


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@contextmanager
def bulk(state_dir: Path, **options) -> Iterator[BulkClient]:
    bucket = options.pop("bucket", None) or TokenBucket(0, CHUNK_BYTES)
    pause = options.pop("pause", lambda _: None)
    server, address = serve(BulkService(state_dir, bucket, pause=pause, **options), "127.0.0.1:0")
    try:
        with BulkClient(address) as client:
            yield client
    finally:
        server.stop(0).wait(WAIT_S)


def model_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(SHADOW)
    (folder / "tokenizer.json").write_text("{}")
    (folder / "pickled.bin").write_bytes(b"never served")
    (tmp_path / "secret.safetensors").write_bytes(b"outside")
    return folder


def files_below(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("pieces", [SHADOW, [SHADOW[:7], memoryview(SHADOW)[7:]]], ids=["whole", "in pieces"])
def test_bulk_put_then_get_shadow_gives_the_same_bytes(tmp_path, pieces):
    with bulk(tmp_path) as client:
        client.put_shadow("j1", "s0-10", pieces, sha256(SHADOW))
        received = client.get_shadow("j1", "s0-10", sha256(SHADOW))

    assert received == SHADOW
    assert files_below(tmp_path) == ["jobs/j1/shadows/s0-10.safetensors"]


def test_bulk_put_shadow_twice_is_answered_without_storing_again(tmp_path):
    with bulk(tmp_path) as client:
        client.put_shadow("j1", "s", SHADOW, sha256(SHADOW))
        inode = ShadowStore(tmp_path).shadow_path("j1", "s").stat().st_ino
        client.put_shadow("j1", "s", SHADOW, sha256(SHADOW))

    assert ShadowStore(tmp_path).shadow_path("j1", "s").stat().st_ino == inode


def test_bulk_put_shadow_of_other_bytes_under_a_taken_id_is_refused(tmp_path):
    with bulk(tmp_path) as client:
        client.put_shadow("j1", "s", SHADOW, sha256(SHADOW))
        with pytest.raises(JobError, match="is not replaced"):
            client.put_shadow("j1", "s", b"other", sha256(b"other"))

        assert client.get_shadow("j1", "s", sha256(SHADOW)) == SHADOW


def test_bulk_put_shadow_with_wrong_sha256_is_refused_and_leaves_nothing(tmp_path):
    with bulk(tmp_path) as client, pytest.raises(FrameError, match="send it again"):
        client.put_shadow("j1", "s", SHADOW, sha256(b"other"))

    assert files_below(tmp_path) == []


def test_bulk_put_shadow_above_the_bound_is_refused(tmp_path):
    with (
        bulk(tmp_path, max_shadow_bytes=1024) as client,
        pytest.raises(JobError, match=r"2\.5 MiB, the bound is 1 KiB"),
    ):
        client.put_shadow("j1", "s", SHADOW, sha256(SHADOW))


@pytest.mark.parametrize(("sent", "announced"), [(b"12", 3), (b"1234", 3)], ids=["short", "long"])
def test_bulk_put_shadow_of_another_length_than_announced_is_refused(tmp_path, sent, announced):
    first = bulk_pb2.PutShadowRequest(job_id="j", shadow_id="s", sha256=sha256(sent), total_bytes=announced)
    with bulk(tmp_path) as client, pytest.raises(grpc.RpcError) as caught:
        client._stub.PutShadow(iter([first, bulk_pb2.PutShadowRequest(data=sent)]), timeout=WAIT_S)

    assert caught.value.code() == grpc.StatusCode.DATA_LOSS
    assert files_below(tmp_path) == []


@pytest.mark.parametrize("name", ["", "..", "../x", "a/b", ".hidden", "a\0b", "a" * 129, "a\n"])
def test_bulk_unsafe_job_and_shadow_names_are_refused(tmp_path, name):
    with bulk(tmp_path) as client:
        with pytest.raises(ConfigError, match="is not allowed"):
            client.put_shadow("j1", name, b"x", sha256(b"x"))
        with pytest.raises(ConfigError, match="is not allowed"):
            client.manifest(name, "0" * 64)

    assert files_below(tmp_path) == []


def test_bulk_get_shadow_changed_on_disk_is_refused_by_the_client(tmp_path):
    with bulk(tmp_path) as client:
        client.put_shadow("j1", "s", SHADOW, sha256(SHADOW))
        ShadowStore(tmp_path).shadow_path("j1", "s").write_bytes(b"rot")

        with pytest.raises(FrameError, match="expected"):
            client.get_shadow("j1", "s", sha256(SHADOW))


def test_bulk_get_shadow_larger_than_allowed_allocates_nothing(tmp_path):
    with bulk(tmp_path) as client:
        client.put_shadow("j1", "s", SHADOW, sha256(SHADOW))
        with pytest.raises(FrameError, match="allowed are 1 KiB"):
            client.get_shadow("j1", "s", sha256(SHADOW), max_bytes=1024)


def test_bulk_get_unknown_shadow_says_so(tmp_path):
    with bulk(tmp_path) as client, pytest.raises(UnknownJobError, match="no shadow s"):
        client.get_shadow("j1", "s", sha256(SHADOW))


def test_bulk_concurrent_puts_are_all_stored_whole(tmp_path):
    shadows = {f"s{index}": bytes([index]) * CHUNK_BYTES * 2 for index in range(8)}

    with bulk(tmp_path) as client, ThreadPoolExecutor(16) as threads:
        puts = [
            threads.submit(client.put_shadow, "j1", name, data, sha256(data))
            for name, data in [*shadows.items(), *shadows.items()]
        ]
        for put in puts:
            put.result(WAIT_S)

    store = ShadowStore(tmp_path)
    assert store.list_shadows("j1") == tuple(sorted(shadows))
    assert all(store.verify("j1", name, sha256(data)) for name, data in shadows.items())


def test_shadow_store_keep_removes_all_others_and_no_other_jobs(tmp_path):
    with bulk(tmp_path) as client:
        for job_id, name in [("j1", "a"), ("j1", "b"), ("j1", "c"), ("j2", "a")]:
            client.put_shadow(job_id, name, b"x", sha256(b"x"))
    store = ShadowStore(tmp_path)

    assert store.keep("j1", {"b", "unknown"}) == ("a", "c")
    assert (store.list_shadows("j1"), store.list_shadows("j2")) == (("b",), ("a",))


def test_shadow_store_delete_job_removes_its_shadows_and_is_idempotent(tmp_path):
    with bulk(tmp_path) as client:
        client.put_shadow("j1", "a", b"x", sha256(b"x"))
    store = ShadowStore(tmp_path)

    store.delete_job("j1")
    store.delete_job("j1")

    assert store.list_shadows("j1") == ()


def real_model_folder(tmp_path: Path) -> Path:
    folder = model_folder(tmp_path)
    save_file({"a": np.arange(9, dtype=np.float32)}, folder / "model.safetensors")
    return folder


def test_bulk_manifest_is_that_of_the_offered_folder(tmp_path):
    manifest = offer_model(tmp_path / "state/jobs/j1", real_model_folder(tmp_path))

    with bulk(tmp_path / "state") as client:
        received = client.manifest("j1", sha256(manifest.to_bytes()))

    assert Manifest.from_bytes(received) == manifest


def test_bulk_offers_packed_tensors_beside_the_stored_ones_without_another_base_hash(tmp_path):
    folder = model_folder(tmp_path)
    save_file({"weight": np.ones((4, 8), np.float32)}, folder / "model.safetensors")
    packed_dir = tmp_path / "packed"
    packed_dir.mkdir()
    save_file({"layer.nf4.codes": np.arange(16, dtype=np.uint8)}, packed_dir / "packed-00000.safetensors")
    index = {"weight_map": {"layer.nf4.codes": "packed-00000.safetensors"}}
    (packed_dir / "model.safetensors.index.json").write_text(json.dumps(index))
    job_dir = tmp_path / "state/jobs/j1"
    plain = offer_model(job_dir, folder)

    offered = offer_model(job_dir, folder, packed_dir=packed_dir)

    assert offered.base_hash == plain.base_hash
    assert set(offered.packed) == {"layer.nf4.codes"}
    assert Manifest.from_bytes(offered.to_bytes()) == offered
    entry = offered.packed["layer.nf4.codes"]
    with bulk(tmp_path / "state") as client:
        data = b"".join(bytes(piece) for piece in client.stream_range("j1", entry.file, entry.start, entry.end))
    assert (data, sha256(data)) == (bytes(range(16)), offered.sha256["layer.nf4.codes"])


def test_bulk_file_of_one_name_in_both_folders_is_refused(tmp_path):
    folder, packed_dir = model_folder(tmp_path), tmp_path / "packed"
    packed_dir.mkdir()
    (packed_dir / "model.safetensors").write_bytes(SHADOW)

    with pytest.raises(ModelError, match="rename the model's file"):
        register_model(tmp_path / "state/jobs/j1", folder, packed_dir)


def test_bulk_manifest_of_a_model_that_changed_is_refused(tmp_path):
    offer_model(tmp_path / "state/jobs/j1", real_model_folder(tmp_path))

    with bulk(tmp_path / "state") as client, pytest.raises(FrameError, match="the model was changed"):
        client.manifest("j1", "0" * 64)


def test_bulk_manifest_of_a_job_that_offers_none_is_told(tmp_path):
    with bulk(tmp_path) as client, pytest.raises(UnknownJobError, match="j1 offers no model"):
        client.manifest("j1", "0" * 64)


def test_bulk_manifest_above_the_bound_is_refused(tmp_path):
    offer_model(tmp_path / "state/jobs/j1", real_model_folder(tmp_path))

    with bulk(tmp_path / "state") as client, pytest.raises(FrameError, match="more than 8"):
        client.manifest("j1", "0" * 64, max_bytes=8)


@pytest.mark.parametrize(("start", "end"), [(0, 0), (5, 5), (3, 17), (0, len(SHADOW)), (len(SHADOW) - 1, len(SHADOW))])
def test_bulk_range_gives_exactly_its_bytes(tmp_path, start, end):
    register_model(tmp_path / "state/jobs/j1", model_folder(tmp_path))

    with bulk(tmp_path / "state") as client:
        assert client.read_range("j1", "model.safetensors", start, end) == SHADOW[start:end]


@pytest.mark.parametrize(("start", "end"), [(5, 4), (0, len(SHADOW) + 1)])
def test_bulk_range_beyond_the_file_is_refused(tmp_path, start, end):
    register_model(tmp_path / "state/jobs/j1", model_folder(tmp_path))
    request = bulk_pb2.GetRangeRequest(job_id="j1", file_name="model.safetensors", start_byte=start, end_byte=end)

    with bulk(tmp_path / "state") as client, pytest.raises(grpc.RpcError) as caught:
        list(client._stub.GetRange(request, timeout=WAIT_S))

    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT


@pytest.mark.parametrize("name", ["../secret.safetensors", "pickled.bin", "/etc/passwd", "", "other.safetensors"])
def test_bulk_range_of_a_file_not_served_is_refused_even_if_it_was_registered(tmp_path, name):
    job_dir = tmp_path / "state/jobs/j1"
    registered = register_model(job_dir, model_folder(tmp_path))
    folders = {name: str(folder) for name, folder in registered.folders.items()}
    folders |= {name: str(tmp_path / "model")} if name != "other.safetensors" else {}
    (job_dir / "model.json").write_text(json.dumps({"folders": folders}))

    with bulk(tmp_path / "state") as client, pytest.raises(ConfigError, match="is not served"):
        client.read_range("j1", name, 0, 1)


def test_bulk_call_without_a_deadline_is_refused(tmp_path):
    with bulk(tmp_path) as client, pytest.raises(grpc.RpcError) as caught:
        list(client._stub.GetShadow(bulk_pb2.GetShadowRequest(job_id="j1", shadow_id="s")))

    assert "needs a deadline" in caught.value.details()


def test_bulk_rate_cap_holds_over_all_calls(tmp_path):
    """Counted on a clock of its own: the bytes moved never exceed burst + rate * time waited."""
    lock, waited_s = threading.Lock(), [0.0]
    bucket = TokenBucket(CHUNK_BYTES, burst_bytes=CHUNK_BYTES, clock=lambda: waited_s[0])

    def pause(seconds: float) -> None:
        with lock:
            waited_s[0] += seconds

    with bulk(tmp_path, bucket=bucket, pause=pause) as client:
        client.put_shadow("j1", "s", SHADOW, sha256(SHADOW))
        client.get_shadow("j1", "s", sha256(SHADOW))

    assert waited_s[0] == pytest.approx((2 * len(SHADOW) - CHUNK_BYTES) / CHUNK_BYTES)


class _BreaksAfterOneChunk(bulk_pb2_grpc.BulkServiceServicer):
    """Serves one chunk a call and then breaks off, as a process that dies would."""

    def __init__(self) -> None:
        self.starts: list[int] = []

    def GetRange(self, request, context):
        self.starts.append(request.start_byte)
        yield SHADOW[request.start_byte : request.end_byte][:CHUNK_BYTES]
        if request.end_byte - request.start_byte > CHUNK_BYTES:
            context.abort(grpc.StatusCode.UNAVAILABLE, "gone")


def test_bulk_client_goes_on_with_a_broken_range_where_it_stopped():
    service, slept_s = _BreaksAfterOneChunk(), []
    server, address = serve(service, "127.0.0.1:0")

    with BulkClient(address, sleep=slept_s.append) as client:
        received = client.read_range("j1", "model.safetensors", 0, len(SHADOW))
    server.stop(0).wait(WAIT_S)

    assert received == SHADOW
    assert service.starts == [0, CHUNK_BYTES, 2 * CHUNK_BYTES]
    assert slept_s == [0.1, 0.2]


class _SendsNothing(bulk_pb2_grpc.BulkServiceServicer):
    """Takes calls and never answers until it is told to end."""

    def __init__(self) -> None:
        self.ended = threading.Event()

    def GetRange(self, request, context):
        context.add_callback(self.ended.set)
        yield b"x"
        self.ended.wait(WAIT_S)


def test_bulk_client_gives_up_a_range_that_stalls_and_the_server_hears_of_it():
    service = _SendsNothing()
    server, address = serve(service, "127.0.0.1:0")

    with BulkClient(address) as client, pytest.raises(UnreachableError, match="sent nothing for 0 s"):
        list(client.stream_range("j1", "model.safetensors", 0, 2, stalled_after_s=0.2))

    assert service.ended.wait(WAIT_S)
    server.stop(0).wait(WAIT_S)


def test_bulk_client_gives_up_after_its_attempts():
    slept_s: list[float] = []

    with BulkClient("127.0.0.1:1", num_attempts=3, sleep=slept_s.append) as client, pytest.raises(UnreachableError):
        client.manifest("j1", "0" * 64)

    assert len(slept_s) == 2


@contextmanager
def bulk_process(state_dir: Path, *options: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    command = [sys.executable, "-m", "coordinator.weights.bulk", "--state-dir", str(state_dir)]
    parent = ["--parent-pid", str(os.getpid())]
    with subprocess.Popen(
        [*command, *parent, *options], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            yield process, json.loads(process.stdout.readline())["address"]
        finally:
            process.kill()


def test_bulk_process_killed_in_an_upload_leaves_no_shadow_and_the_next_one_sweeps(tmp_path):
    first = bulk_pb2.PutShadowRequest(job_id="j1", shadow_id="s", sha256=sha256(SHADOW), total_bytes=len(SHADOW))
    chunk = bulk_pb2.PutShadowRequest(data=SHADOW[:1000])
    with bulk_process(tmp_path) as (process, address):

        def requests() -> Iterator[bulk_pb2.PutShadowRequest]:
            yield from (first, chunk)
            deadline_s, tick = time.monotonic() + WAIT_S, threading.Event()
            while not files_below(tmp_path) and time.monotonic() < deadline_s:
                tick.wait(0.01)
            process.kill()
            process.wait(WAIT_S)

        with BulkClient(address) as client, pytest.raises(grpc.RpcError):
            client._stub.PutShadow(requests(), timeout=WAIT_S)

    assert len(files_below(tmp_path)) == 1
    assert ShadowStore(tmp_path).list_shadows("j1") == ()
    with bulk_process(tmp_path) as (_, address), BulkClient(address) as client:
        client.put_shadow("j1", "s", SHADOW, sha256(SHADOW))
    assert files_below(tmp_path) == ["jobs/j1/shadows/s.safetensors"]


@pytest.mark.parametrize("end", ["stdin", "sigterm"])
def test_bulk_process_ends_well_when_its_parent_lets_go(tmp_path, end):
    with bulk_process(tmp_path) as (process, _):
        if end == "stdin":
            process.stdin.close()
        else:
            process.send_signal(signal.SIGTERM)
        assert process.wait(WAIT_S) == 0


def test_bulk_process_of_another_parent_ends_at_once(tmp_path):
    with bulk_process(tmp_path, "--parent-pid", "1") as (process, _):
        assert process.wait(WAIT_S) == 0


def test_bulk_process_refuses_to_listen_beyond_loopback(tmp_path):
    command = [sys.executable, "-m", "coordinator.weights.bulk", "--address", "0.0.0.0:0", "--parent-pid", "1"]

    ended = subprocess.run(
        [*command, "--state-dir", str(tmp_path)], cwd=ROOT, capture_output=True, text=True, timeout=WAIT_S, check=False
    )

    assert ended.returncode == 9
    assert "not a loopback address" in ended.stderr
