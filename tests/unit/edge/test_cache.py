from __future__ import annotations

import errno
import hashlib
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from edge_node import cache as cache_module
from edge_node import cache_entries
from edge_node.cache import BlobCache, OverBudgetError
from plutino.errors import AgentError, FrameError

DATA = bytes(range(256)) * 16
NAME = "ab" * 32


def key_of(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def blob(number: int, size: int = 1000) -> bytes:
    return bytes([number]) * size


def store(cache: BlobCache, data: bytes) -> Path:
    with cache.receive(key_of(data), len(data)) as incoming:
        incoming.write(data)
        return incoming.publish()


def used_at(cache: BlobCache, data: bytes, seconds: float) -> None:
    path = cache.find(key_of(data))
    os.utime(path, (seconds, seconds))


def test_stored_blob_is_found_by_its_hash_and_no_part_is_left(tmp_path):
    cache = BlobCache(tmp_path)
    store(cache, DATA)

    assert BlobCache(tmp_path).check(key_of(DATA)).read_bytes() == DATA
    assert list((tmp_path / "parts").iterdir()) == []


def test_blob_published_while_the_cache_is_counted_is_counted(tmp_path, monkeypatch):
    cache = BlobCache(tmp_path)
    with cache.receive(key_of(DATA), len(DATA)) as incoming:
        incoming.write(DATA)
        status = cache_module._status

        def status_after_publishing(path: Path) -> os.stat_result | None:
            if incoming.path is None:
                incoming.path = incoming.publish()
            return status(path)

        monkeypatch.setattr(cache_module, "_status", status_after_publishing)

        (item,) = cache._items()

    assert (item.path, item.num_bytes, item.is_part) == (incoming.path, len(DATA), False)


def test_download_that_broke_goes_on_where_it_stopped(tmp_path):
    cache = BlobCache(tmp_path)
    with pytest.raises(RuntimeError), cache.receive(key_of(DATA), len(DATA)) as incoming:
        incoming.write(DATA[:1000])
        raise RuntimeError("the link broke")

    with cache.receive(key_of(DATA), len(DATA)) as incoming:
        assert incoming.received_bytes == 1000
        incoming.write(DATA[1000:])
        assert incoming.publish().read_bytes() == DATA


def test_bytes_that_are_not_the_named_ones_are_never_published_and_dropped(tmp_path):
    cache = BlobCache(tmp_path)
    with cache.receive(key_of(DATA), len(DATA)) as incoming:
        incoming.write(b"x" + DATA[1:])
        with pytest.raises(FrameError, match="expected"):
            incoming.publish()
        assert incoming.received_bytes == 0

    assert cache.find(key_of(DATA)) is None


@pytest.mark.parametrize("sent", [DATA[:-1], DATA + b"x"], ids=["short", "long"])
def test_another_length_than_announced_is_refused(tmp_path, sent):
    with pytest.raises(FrameError), BlobCache(tmp_path).receive(key_of(DATA), len(DATA)) as incoming:
        incoming.write(sent)
        incoming.publish()


def test_flipped_byte_on_the_disk_is_found_and_the_blob_removed(tmp_path):
    cache = BlobCache(tmp_path)
    path = store(cache, DATA)
    path.write_bytes(DATA[:-1] + b"x")

    assert cache.find(key_of(DATA)) == path
    assert cache.check(key_of(DATA)) is None
    assert not path.exists()


def test_what_was_used_longest_ago_is_evicted_first(tmp_path):
    cache = BlobCache(tmp_path, 3000)
    for number in (1, 2, 3):
        store(cache, blob(number))
    for number, seconds in ((1, 30.0), (2, 10.0), (3, 20.0)):
        used_at(cache, blob(number), seconds)

    store(cache, blob(4))

    assert [cache.find(key_of(blob(n))) is not None for n in (1, 2, 3, 4)] == [True, False, True, True]
    assert cache.used_bytes() == 3000


def test_what_a_live_pin_names_is_never_evicted_and_the_refusal_names_the_option(tmp_path):
    cache = BlobCache(tmp_path, 2000)
    with cache.pin([key_of(blob(1))]) as pin:
        pin.add([key_of(blob(2))])
        store(cache, blob(1))
        store(cache, blob(2))
        with pytest.raises(OverBudgetError, match=r"running jobs use the rest.*--cache"):
            cache.receive(key_of(blob(3)), 1000)
        assert cache.find(key_of(blob(1))) and cache.find(key_of(blob(2)))

    store(cache, blob(3))


def test_pin_of_a_process_that_was_killed_holds_nothing_any_more(tmp_path):
    code = (
        "import sys; from pathlib import Path; from edge_node.cache import BlobCache\n"
        "pin = BlobCache(Path(sys.argv[1]), 1000).pin([sys.argv[2]]); print('pinned', flush=True); sys.stdin.read()"
    )
    cache = BlobCache(tmp_path, 1000)
    store(cache, blob(1))
    child = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path), key_of(blob(1))], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert child.stdout.readline() == b"pinned\n"
        with pytest.raises(OverBudgetError):
            cache.receive(key_of(blob(2)), 1000)
    finally:
        child.send_signal(signal.SIGKILL)
        child.communicate(timeout=20)

    store(cache, blob(2))
    assert list((tmp_path / "pins").iterdir()) == []


def test_download_in_progress_counts_at_its_full_size_and_is_not_evicted(tmp_path):
    cache = BlobCache(tmp_path, 1500)
    with cache.receive(key_of(blob(1)), 1000) as incoming:
        incoming.write(blob(1)[:10])
        with pytest.raises(OverBudgetError):
            cache.receive(key_of(blob(2)), 1000)
        incoming.write(blob(1)[10:])
        incoming.publish()


def test_download_that_a_dead_process_left_is_evicted_when_room_is_needed(tmp_path):
    cache = BlobCache(tmp_path, 1500)
    with cache.receive(key_of(blob(1)), 1000) as incoming:
        incoming.write(blob(1)[:10])

    store(cache, blob(2))

    assert list((tmp_path / "parts").iterdir()) == []


def test_two_that_want_one_blob_share_one_download(tmp_path):
    cache, waits, written = BlobCache(tmp_path), threading.Event(), []

    def second() -> None:
        other = BlobCache(tmp_path, sleep=lambda _: waits.set())
        with other.receive(key_of(DATA), len(DATA)) as incoming:
            written.append(incoming.path is None)

    with cache.receive(key_of(DATA), len(DATA)) as incoming:
        thread = threading.Thread(target=second)
        thread.start()
        assert waits.wait(20)
        incoming.write(DATA)
        incoming.publish()
    thread.join(20)

    assert written == [False]


def test_other_download_that_does_not_grow_is_not_waited_for(tmp_path):
    now_s = iter(range(0, 10000, 50))
    impatient = BlobCache(tmp_path, clock=lambda: next(now_s), sleep=lambda _: None)
    with (
        BlobCache(tmp_path).receive(key_of(DATA), len(DATA)),
        pytest.raises(OverBudgetError, match="has not grown for 120 s"),
    ):
        impatient.receive(key_of(DATA), len(DATA))


def test_full_disk_is_told_and_gives_back_what_the_blob_took(tmp_path, monkeypatch):
    cache, left = BlobCache(tmp_path), [1000]

    def write(descriptor: int, view: memoryview) -> None:
        if len(view) > left[0]:
            raise OSError(errno.ENOSPC, "No space left on device")
        left[0] -= len(view)
        os.write(descriptor, view)

    monkeypatch.setattr(cache_entries, "write_all", write)
    with (
        pytest.raises(AgentError, match=r"the disk is full.*--cache-dir"),
        cache.receive(key_of(DATA), len(DATA)) as incoming,
    ):
        incoming.write(DATA[:1000])
        incoming.write(DATA[1000:])

    assert [path.stat().st_size for path in (tmp_path / "parts").iterdir()] == [0]
    assert cache.find(key_of(DATA)) is None


def test_disk_without_room_is_told_before_anything_is_downloaded(tmp_path, monkeypatch):
    usage = type("Usage", (), {"free": 100 << 20})
    monkeypatch.setattr(cache_module.shutil, "disk_usage", lambda _: usage)

    with pytest.raises(AgentError, match="has 36 MiB to give, a tensor needs 40 MiB"):
        BlobCache(tmp_path).receive(key_of(DATA), 40 << 20)


def test_made_content_is_found_by_the_name_of_its_inputs(tmp_path):
    cache = BlobCache(tmp_path)
    key = cache.put(NAME, [DATA[:7], memoryview(DATA)[7:]])

    assert key == key_of(DATA)
    assert cache.lookup(NAME).read_bytes() == DATA
    assert cache.lookup("cd" * 32) is None


def test_made_content_whose_bytes_changed_or_that_was_evicted_is_not_found(tmp_path):
    cache = BlobCache(tmp_path)
    cache.find(cache.put(NAME, [DATA])).write_bytes(b"other")
    assert cache.lookup(NAME) is None

    cache.remove(cache.put(NAME, [DATA]))
    assert cache.lookup(NAME) is None
    assert [path for path in (tmp_path / "names").rglob("*") if path.is_file()] == []
