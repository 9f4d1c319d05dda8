"""Several stores on one folder: agents of a machine, workers of an agent, replicas that write the same states."""

from __future__ import annotations

import subprocess
import sys
import threading
from contextlib import closing

import numpy as np
import pytest

from edge_node.activation_cache.store import ActivationStore
from plutino.errors import AgentError

NUM_ENTRIES, ENTRY_BYTES = 60, 1000
WRITER = f"""
import sys
from pathlib import Path
import numpy as np
from edge_node.activation_cache.store import ActivationStore

root, namespace, first = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
file = ActivationStore(root, int(sys.argv[4])).open(namespace, "h1")
numbers = range(first, first + {NUM_ENTRIES})
print(sum(file.write(number.to_bytes(16, "big"), np.full({ENTRY_BYTES}, number % 251, np.uint8)) for number in numbers))
"""


def key_of(number):
    return number.to_bytes(16, "big")


def entry(number):
    return np.full(ENTRY_BYTES, number % 251, np.uint8)


def opened(root, namespace="space", budget_bytes=1 << 20):
    return closing(ActivationStore(root, budget_bytes).open(namespace, "h1"))


def used_bytes(root):
    return sum(path.stat().st_size for path in root.rglob("*") if path.is_file())


def in_threads(call, num):
    """What calls with 0, 1, ... at the same time gave."""
    found, barrier = [None] * num, threading.Barrier(num)

    def run(number):
        barrier.wait(10)
        found[number] = call(number)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(num)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return found


def test_writers_of_the_same_states_find_each_others_entries_and_keep_none_twice(tmp_path):
    with opened(tmp_path) as first, opened(tmp_path) as second:
        assert first.write(key_of(1), entry(1))
        assert second.write(key_of(1), entry(1))
        assert second.write(key_of(2), entry(2))
        assert np.array_equal(first.read(key_of(2)), entry(2))
        assert len(first) == len(second) == 2

    assert (tmp_path / "space" / "h1.index").stat().st_size == 2 * 32


def test_processes_that_write_the_same_states_at_once_lose_and_tear_nothing(tmp_path):
    # Half of what either writes the other one writes, too.
    starts = [0, NUM_ENTRIES // 2]
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path), "space", str(start), str(1 << 20)], stdout=subprocess.PIPE
        )
        for start in starts
    ]
    written = [int(writer.communicate(timeout=30)[0]) for writer in writers]

    assert written == [NUM_ENTRIES] * 2
    with opened(tmp_path) as file:
        assert len(file) == starts[1] + NUM_ENTRIES
        assert all(np.array_equal(file.read(key_of(number)), entry(number)) for number in range(len(file)))
        assert file.num_damaged == 0
    assert (tmp_path / "space" / "h1.index").stat().st_size == 32 * (starts[1] + NUM_ENTRIES)


def test_budget_is_one_for_all_stores_of_a_folder_and_is_used_up_to_the_last_entry(tmp_path):
    budget_bytes = 50_000

    def fill(number):
        with opened(tmp_path, f"job{number}", budget_bytes) as file:
            started.wait(10)
            written = sum(file.write(key_of(n), entry(n)) for n in range(NUM_ENTRIES))
            ended.wait(10)  # nobody's namespace is free to go
            return written

    started, ended = threading.Barrier(4), threading.Barrier(4)
    written = in_threads(fill, 4)

    assert used_bytes(tmp_path) <= budget_bytes < used_bytes(tmp_path) + 2 * ENTRY_BYTES
    assert sum(written) == sum(path.stat().st_size // 32 for path in tmp_path.glob("*/h1.index"))


def test_namespaces_that_come_and_go_in_several_stores_are_removed_once_and_harm_nobody(tmp_path):
    budget_bytes = 20_000

    def come_and_go(number):
        for turn in range(25):
            with opened(tmp_path, f"job{number}-{turn % 3}", budget_bytes) as file:
                for n in range(5):
                    if file.write(key_of(n), entry(n)):
                        assert np.array_equal(file.read(key_of(n)), entry(n))
        return "well"

    assert in_threads(come_and_go, 4) == ["well"] * 4
    assert used_bytes(tmp_path) <= budget_bytes


def test_bytes_that_a_crash_counted_and_never_wrote_are_found_again(tmp_path):
    with opened(tmp_path, budget_bytes=4_000) as file:
        assert file.write(key_of(0), entry(0))
    (tmp_path / "lock").write_bytes((4_000).to_bytes(8, "little"))

    with opened(tmp_path, budget_bytes=4_000) as file:
        assert [file.write(key_of(n), entry(n)) for n in (1, 2, 3)] == [True, True, False]
    assert used_bytes(tmp_path) <= 4_000


def test_full_cache_looks_again_for_what_others_have_let_go_of(tmp_path):
    budget_bytes = 4_000
    with opened(tmp_path, "own", budget_bytes) as own:
        with opened(tmp_path, "other", budget_bytes) as other:
            assert all(other.write(key_of(n), entry(n)) for n in range(3))
            assert not own.write(key_of(0), entry(0))
        tries = [own.write(key_of(0), entry(0)) for _ in range(64)]

    assert tries[-1]
    assert not (tmp_path / "other").exists()


def test_folder_that_cannot_be_made_is_told_with_the_ways_out(tmp_path):
    (tmp_path / "file").write_text("")

    with pytest.raises(AgentError, match=r"file.*: Not a directory; mend that, let --cache-dir .*--activation-cache 0"):
        ActivationStore(tmp_path / "file" / "activations", 1 << 20).open("space", "h1")
