"""Joining parts: what is taken, and what is refused."""

from __future__ import annotations

import json

import numpy as np
import pytest
from safetensors.numpy import save

from coordinator.artifacts.join import PartJoiner, read_tensors
from plutino.errors import ExportError

A = np.arange(6, dtype=np.float32).reshape(2, 3)
B = np.full((4,), 0.5, np.float32)


def test_read_tensors_takes_only_the_prefix_and_its_exact_values() -> None:
    data = save({"param/a": A, "exp_avg/a": B})

    tensors = read_tensors(data, "part", "param/")

    assert list(tensors) == ["a"]
    assert np.array_equal(tensors["a"], A)


@pytest.mark.parametrize("cut", [0, 4, 8, 40])
def test_read_tensors_of_a_cut_file_is_refused(cut: int) -> None:
    with pytest.raises(ExportError, match="nothing was published"):
        read_tensors(save({"a": A})[:cut], "part")


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "BF16", "shape": [2], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]},
        {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [2]},
        "F32",
    ],
)
def test_read_tensors_with_a_wrong_header_entry_is_refused(entry: object) -> None:
    header = json.dumps({"a": entry}).encode()

    with pytest.raises(ExportError, match="a of part"):
        read_tensors(len(header).to_bytes(8, "little") + header + bytes(8), "part")


def test_joiner_parts_of_two_stages_are_all_there() -> None:
    joiner = PartJoiner(["a", "b"])
    joiner.add("part 0", {"a": A})
    joiner.add("part 1", {"b": B})

    tensors, _ = joiner.joined()

    assert np.array_equal(tensors["a"], A) and np.array_equal(tensors["b"], B)


def test_joiner_keeps_its_own_copy_of_a_part() -> None:
    joiner, value = PartJoiner(["a"]), A.copy()

    joiner.add("part 0", {"a": value})
    value += 1

    assert np.array_equal(joiner.joined()[0]["a"], A)


def test_joiner_holders_with_equal_bytes_count_once() -> None:
    joiner = PartJoiner(["a"])

    joiner.add("part 0", {"a": A})
    joiner.add("part 1", {"a": A.copy()})

    assert list(joiner.joined()[0]) == ["a"]


def test_joiner_holders_that_differ_are_refused_with_both_names_and_the_difference() -> None:
    joiner, drifted = PartJoiner(["a"]), A.copy()
    drifted[1, 2] += 0.25
    joiner.add("part 0", {"a": A})

    with pytest.raises(
        ExportError, match=r"a is not the same in part 0 and part 1: 1 of 6 values differ, by up to 0.25"
    ):
        joiner.add("part 1", {"a": drifted})


def test_joiner_holders_with_another_shape_are_refused() -> None:
    joiner = PartJoiner(["a"])
    joiner.add("part 0", {"a": A})

    with pytest.raises(ExportError, match=r"shape \[2, 3\] in the one, \[3, 2\] in the other"):
        joiner.add("part 1", {"a": A.reshape(3, 2)})


def test_joiner_missing_parameter_is_named() -> None:
    joiner = PartJoiner(["a", "b"])
    joiner.add("part 0", {"a": A})

    with pytest.raises(ExportError, match="lack 1 of 2 parameters, first b"):
        joiner.joined()


def test_joiner_unexpected_parameter_is_refused() -> None:
    with pytest.raises(ExportError, match="part 0 holds b, which is none of the job's 1 parameters"):
        PartJoiner(["a"]).add("part 0", {"b": B})


def test_joiner_parameter_that_is_not_finite_is_refused() -> None:
    with pytest.raises(ExportError, match="b of part 0 has 1 of 4 values that are not finite"):
        PartJoiner(["b"]).add("part 0", {"b": np.array([1, np.nan, 2, 3], np.float32)})
