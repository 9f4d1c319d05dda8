"""Files of the activation cache: what was written is found, what is broken is not, and the budget holds."""

from __future__ import annotations

import errno
import os

import numpy as np
import pytest

from edge_node.activation_cache.store import ActivationStore, billed_bytes

KEYS = [bytes([number]) * 16 for number in range(8)]


def entry(number, num_bytes=1000):
    return np.full(num_bytes, number, np.uint8)


def used_bytes(root):
    return sum(path.stat().st_size for path in root.rglob("*") if path.is_file())


def test_entries_are_found_by_whoever_opens_the_files_later(tmp_path):
    file = ActivationStore(tmp_path, 1 << 20).open("space", "h1")
    for number, key in enumerate(KEYS):
        assert file.write(key, entry(number, 100 + number))
    assert np.array_equal(file.read(KEYS[7]), entry(7, 107))
    file.close()

    again = ActivationStore(tmp_path, 1 << 20).open("space", "h1")

    assert len(again) == len(KEYS)
    for number, key in enumerate(KEYS):
        assert np.array_equal(again.read(key), entry(number, 100 + number))
    assert again.read(bytes(16)[:-1] + b"x") is None
    again.close()


def test_entry_whose_record_or_bytes_a_crash_cut_off_is_not_there_and_the_next_ones_are_right(tmp_path):
    file = ActivationStore(tmp_path, 1 << 20).open("space", "h1")
    for number in range(3):
        file.write(KEYS[number], entry(number))
    file.close()
    index, data = tmp_path / "space" / "h1.index", tmp_path / "space" / "h1.data"
    index.write_bytes(index.read_bytes()[:-5])
    data.write_bytes(data.read_bytes()[:1500])

    again = ActivationStore(tmp_path, 1 << 20).open("space", "h1")

    assert [again.holds(key) for key in KEYS[:3]] == [True, False, False]
    assert again.num_damaged == 1
    assert again.write(KEYS[4], entry(9))
    again.close()
    third = ActivationStore(tmp_path, 1 << 20).open("space", "h1")
    assert [third.holds(key) for key in KEYS[:5]] == [True, False, False, False, True]
    assert np.array_equal(third.read(KEYS[4]), entry(9))
    third.close()


# In the sums of words, in their last one, in what is left over, and the last byte of all.
@pytest.mark.parametrize("place", [0, 500, 4991, 4992, 4999])
def test_changed_bit_is_noticed_and_the_entry_can_be_written_anew(tmp_path, place):
    store = ActivationStore(tmp_path, 1 << 20)
    file = store.open("space", "h1")
    file.write(KEYS[1], entry(2, 100))
    file.write(KEYS[0], entry(1, 5000))
    with (tmp_path / "space" / "h1.data").open("r+b") as raw:
        raw.seek(128 + place)
        raw.write(b"\x03")

    assert file.read(KEYS[0]) is None
    assert file.num_damaged == 1
    assert file.write(KEYS[0], entry(1, 5000))
    assert np.array_equal(file.read(KEYS[0]), entry(1, 5000))
    file.close()


def test_full_budget_refuses_entries_and_is_never_exceeded(tmp_path):
    file = ActivationStore(tmp_path, 4500).open("space", "h1")

    written = [file.write(key, entry(0)) for key in KEYS]

    assert written == [True] * 4 + [False] * 4
    assert used_bytes(tmp_path) <= 4500
    file.close()


def test_room_is_made_for_whole_things_of_which_smaller_ones_may_still_fit(tmp_path):
    store = ActivationStore(tmp_path, 4500)
    file = store.open("space", "h1")
    one = billed_bytes(1000)

    with store.writing("space", [one, one]) as is_room:
        assert is_room == [True, True]
        assert file.append([(key, entry(7)) for key in KEYS[:2]])
    with store.writing("space", [3 * one, one, one, one]) as is_room:
        assert is_room == [False, True, True, False]
        assert file.append([(key, entry(7)) for key in KEYS[2:4]])

    assert [file.holds(key) for key in KEYS] == [True] * 4 + [False] * 4
    assert used_bytes(tmp_path) <= 4500
    file.close()


def test_what_needs_no_room_has_it_in_a_folder_above_its_budget(tmp_path):
    roomy = ActivationStore(tmp_path, 9000)
    file = roomy.open("space", "h1")
    assert all(file.write(key, entry(1)) for key in KEYS[:4])

    with ActivationStore(tmp_path, 3000).writing("space", [0, billed_bytes(10), 0]) as is_room:
        assert is_room == [True, False, True]
    file.close()


def test_budget_holds_whatever_was_left_where_entries_cannot_begin(tmp_path):
    store = ActivationStore(tmp_path, 200)
    file = store.open("space", "h1")
    assert file.write(KEYS[0], entry(1, 1))
    # Counts anew.
    assert not file.write(KEYS[1], entry(1, 500))

    written = file.write(KEYS[2], entry(1, 64))

    assert used_bytes(tmp_path) <= 200
    assert written == file.has(KEYS[2])
    file.close()


def test_entry_that_comes_twice_lies_there_once(tmp_path):
    store = ActivationStore(tmp_path, 1 << 20)
    file = store.open("space", "h1")
    with store.writing("space", [billed_bytes(1000)] * 2):
        assert file.append([(KEYS[0], entry(1)), (KEYS[0], entry(1))])

    assert len(file) == 1
    assert (tmp_path / "space" / "h1.data").stat().st_size == 1000
    file.close()


def test_many_entries_in_one_go_are_all_there_and_those_that_were_there_stay(tmp_path):
    store = ActivationStore(tmp_path, 8 << 20)
    file, other = store.open("space", "h1"), store.open("space", "h1")
    keys = [number.to_bytes(16, "big") for number in range(1500)]
    assert other.write(keys[3], entry(9, 70))

    with store.writing("space", [billed_bytes(70)] * len(keys)) as is_room:
        assert all(is_room)
        assert file.append([(key, entry(number % 7, 70)) for number, key in enumerate(keys)])

    assert np.array_equal(file.read(keys[3]), entry(9, 70))
    assert all(np.array_equal(other.read(key), entry(number % 7, 70)) for number, key in enumerate(keys) if number != 3)
    assert len(file) == len(other) == len(keys)
    file.close()
    other.close()


def test_disk_that_refuses_a_part_leaves_what_was_there_and_is_not_asked_again(tmp_path, monkeypatch, caplog):
    store = ActivationStore(tmp_path, 1 << 20)
    file = store.open("space", "h1")
    assert file.append([(KEYS[0], entry(1))])
    write, sizes = os.writev, []

    def nearly_full(descriptor, pieces):
        """Take half of what comes, and nothing after that."""
        if sizes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sizes.append(write(descriptor, [b"".join(pieces)[:500]]))
        return sizes[0]

    monkeypatch.setattr(os, "writev", nearly_full)
    assert not file.append([(KEYS[1], entry(2))])
    monkeypatch.undo()

    assert "No space left on device" in caplog.text
    assert not file.append([(KEYS[2], entry(3))])
    again = store.open("space", "h1")
    assert [again.holds(key) for key in KEYS[:3]] == [True, False, False]
    assert again.write(KEYS[1], entry(4))
    assert np.array_equal(again.read(KEYS[1]), entry(4))
    file.close()
    again.close()


def test_namespaces_of_other_jobs_make_room_unless_they_are_in_use(tmp_path):
    idle, busy = (ActivationStore(tmp_path, 10_000).open(name, "h1") for name in ("idle", "busy"))
    for number in range(3):
        assert idle.write(KEYS[number], entry(0))
        assert busy.write(KEYS[number], entry(0))
    idle.close()

    own = ActivationStore(tmp_path, 10_000).open("own", "h1")
    while own.write(KEYS[len(own)], entry(0)):
        pass

    assert not (tmp_path / "idle").exists()
    assert busy.holds(KEYS[2])
    busy.close()
    own.close()


def test_reader_beside_a_writer_finds_what_is_written_after_it_opened_the_files(tmp_path):
    writer = ActivationStore(tmp_path, 1 << 20).open("space", "h1")
    reader = ActivationStore(tmp_path, 1 << 20).open("space", "h1")
    assert not reader.has(KEYS[0])
    writer.write(KEYS[0], entry(0))
    writer.write(KEYS[1], entry(1))

    assert reader.has(KEYS[0])
    assert np.array_equal(reader.read(KEYS[1]), entry(1))
    assert len(reader) == 2
    writer.close()
    reader.close()


def test_what_a_reader_does_to_an_entry_changes_nobody_elses(tmp_path):
    file = ActivationStore(tmp_path, 1 << 20).open("space", "h1")
    file.write(KEYS[0], entry(3))
    file.read(KEYS[0])[:] = 9

    assert np.array_equal(file.read(KEYS[0]), entry(3))
    file.close()
