from __future__ import annotations

import hashlib
import queue
import threading
from contextlib import contextmanager

import pytest
import torch
from safetensors.torch import load

from edge_node.shadowing import ShadowWriter, safetensors_pieces
from plutino.errors import UnreachableError
from plutino.types import JobId, WorkerRef

WAIT_S = 10.0
WORKER = WorkerRef(JobId("job"), 3, 1)


class FakeBulk:
    """Stores shadows in memory; each of ``failures`` is raised by one call, and ``gate`` holds calls up."""

    def __init__(self, *failures: Exception) -> None:
        self.failures = list(failures)
        self.stored: dict[str, bytes] = {}
        self.calls: queue.Queue[str] = queue.Queue()
        self.gate = threading.Event()
        self.gate.set()

    def put_shadow(self, job_id, shadow_id, data, sha256):
        self.calls.put(shadow_id)
        assert self.gate.wait(WAIT_S)
        if self.failures:
            raise self.failures.pop(0)
        self.stored[shadow_id] = b"".join(data)
        assert hashlib.sha256(self.stored[shadow_id]).hexdigest() == sha256


@contextmanager
def writer_to(bulk: FakeBulk, *, retry_s=(0.001, 0.01)):
    stored = queue.Queue()
    writer = ShadowWriter(WORKER, bulk, stored.put, retry_s=retry_s)
    try:
        yield writer, stored
    finally:
        bulk.gate.set()
        writer.close(drain_s=WAIT_S)
        assert not writer._thread.is_alive()


def snapshot(value: float = 1.0) -> dict[str, torch.Tensor]:
    return {
        "param/b": torch.full((2, 3), value),
        "param/a": torch.full((2,), value),
        "exp_avg/a": torch.zeros(2),
        "adam_step/a": torch.tensor(value),
    }


def test_shadow_is_reported_once_it_lies_safe():
    bulk = FakeBulk()
    with writer_to(bulk) as (writer, stored):
        writer.write(4, snapshot())
        report = stored.get(timeout=WAIT_S)

    data = bulk.stored[report.shadow_id]
    assert (report.step, report.shadow_id) == (4, "step4-epoch3-stage1-0")
    assert (report.bytes, report.sha256) == (len(data), hashlib.sha256(data).hexdigest())
    assert list(report.parameter_names) == ["a", "b"]


def test_failed_shadow_is_tried_again_without_troubling_the_writer():
    bulk = FakeBulk(UnreachableError("bulk process away"), UnreachableError("still away"))
    with writer_to(bulk) as (writer, stored):
        writer.write(4, snapshot())

        assert stored.get(timeout=WAIT_S).step == 4


def test_failed_shadow_gives_way_to_a_newer_one():
    bulk = FakeBulk(UnreachableError("bulk process away"))
    bulk.gate.clear()
    with writer_to(bulk, retry_s=(600.0, 600.0)) as (writer, stored):
        writer.write(4, snapshot())
        bulk.calls.get(timeout=WAIT_S)
        writer.write(5, snapshot(2.0))
        bulk.gate.set()

        assert stored.get(timeout=WAIT_S).step == 5
    assert bulk.stored.keys() == {"step5-epoch3-stage1-0"}


def test_writer_waits_while_a_snapshot_waits_behind_the_one_being_sent():
    bulk = FakeBulk()
    bulk.gate.clear()
    with writer_to(bulk) as (writer, stored):
        writer.write(1, snapshot())
        bulk.calls.get(timeout=WAIT_S)
        writer.write(2, snapshot())
        third = threading.Thread(target=writer.write, args=(3, snapshot()))
        third.start()
        bulk.gate.set()
        third.join(WAIT_S)

        assert [stored.get(timeout=WAIT_S).step for _ in range(3)] == [1, 2, 3]


def test_unforeseen_error_reaches_who_writes_the_next_shadow():
    """The upload thread used to die in silence; the third shadow then blocked training for ever."""
    with writer_to(FakeBulk(ZeroDivisionError("a fault of ours"))) as (writer, _):
        writer.write(1, snapshot())
        writer._thread.join(WAIT_S)

        with pytest.raises(ZeroDivisionError, match="a fault of ours"):
            writer.write(2, snapshot())


def test_close_stores_what_is_queued():
    bulk = FakeBulk()
    with writer_to(bulk) as (writer, _):
        writer.write(1, snapshot())

    assert bulk.stored.keys() == {"step1-epoch3-stage1-0"}


def test_close_does_not_wait_longer_than_its_bound_for_an_upload_that_hangs(caplog):
    bulk = FakeBulk()
    bulk.gate.clear()
    with writer_to(bulk) as (writer, _):
        writer.write(1, snapshot())
        bulk.calls.get(timeout=WAIT_S)

        writer.close(drain_s=0.01)

    assert "it is given up" in caplog.text


def test_safetensors_pieces_are_a_file_that_safetensors_reads_and_hold_no_copy():
    tensors = snapshot() | {"param/empty": torch.zeros(0, 3), "param/strided": torch.arange(6.0).reshape(2, 3).T}

    pieces = safetensors_pieces(tensors)
    read = load(b"".join(pieces))

    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[name], tensor) for name, tensor in tensors.items())
    tensors["param/b"].fill_(7.0)
    assert torch.equal(load(b"".join(pieces))["param/b"], tensors["param/b"])
