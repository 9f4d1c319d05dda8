from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_node.engine.running_sum import RunningSum, travelling_bytes
from edge_node.engine.sum_rounding import MAX_EXPONENT, narrow, round_sums, widen

FLOATS = st.floats(-(2.0**127), 2.0**127, width=32)
# Most floats that hypothesis draws are far apart; gradients of one parameter are not.
NEAR = st.tuples(st.integers(-90, 90), st.lists(st.floats(-1, 1, width=32), min_size=1, max_size=12)).map(
    lambda drawn: [value * 2.0 ** drawn[0] for value in drawn[1]]
)
SUMS = st.lists(st.lists(FLOATS, min_size=1, max_size=12) | NEAR, min_size=1, max_size=5)


def rounded(*values):
    sums = [torch.tensor(each, dtype=torch.float32) for each in values]
    round_sums(sums)
    return sums


@settings(max_examples=80, deadline=None)
@given(SUMS)
def test_rounding_is_that_of_float16_at_the_scale_of_the_largest_and_changes_nothing_the_second_time(values):
    once = rounded(*values)

    for sums, got in zip(values, once, strict=True):
        exact = torch.tensor(sums, dtype=torch.float32).double()
        largest = exact.abs().max()
        # Half of the last place, of a normal and of a subnormal number; below 2^-86 the scale grows no further.
        allowed = torch.maximum(exact.abs() * 2.0**-11, largest * 2.0**-39).clamp(min=2.0 ** -(25 + MAX_EXPONENT))
        assert ((got.double() - exact).abs() <= allowed).all()
        assert (got[exact == 0] == 0).all()
    for one, again in zip(once, rounded(*(each.tolist() for each in once)), strict=True):
        assert torch.equal(again, one)


@settings(max_examples=40, deadline=None)
@given(SUMS)
def test_what_travels_has_the_bits_of_what_stays(values):
    sums = [torch.tensor(each, dtype=torch.float32) for each in values]
    halves = [torch.empty_like(each, dtype=torch.float16) for each in sums]
    exponents = narrow([each.clone() for each in sums], halves)
    received = [torch.empty_like(each) for each in sums]

    widen(halves, exponents, received)

    assert all(torch.equal(*pair) for pair in zip(received, rounded(*values), strict=True))
    # Exponents travel as float16 numbers, which hold these integers.
    assert all(abs(exponent) <= 2048 for exponent in exponents)


def test_largest_that_float16_rounds_up_to_the_next_power_of_two_is_scaled_for_that_one():
    halves = [torch.empty(2, dtype=torch.float16)]

    (exponent,) = narrow([torch.tensor([1 - 2.0**-13, 2.0**-25])], halves)

    assert (exponent, halves[0].tolist()) == (14, [2.0**14, 2.0**-11])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_sum_that_is_not_finite_stays_so_and_others_are_rounded_as_ever(bad):
    broken, whole, zeros = rounded([1.0, bad], [1 + 2.0**-20, 3e-39], [0.0, -0.0])

    assert not broken.isfinite().all() and broken[0] == 1
    assert whole.tolist() == [1.0, 0.0] and zeros.tolist() == [0.0, 0.0]


SHAPES = {"a": torch.Size([3, 2]), "b": torch.Size([5])}


@pytest.mark.parametrize("sums", ["fp32", "fp16"])
def test_message_of_a_running_sum_is_one_tensor_of_the_bytes_that_are_priced(sums):
    running = RunningSum(SHAPES, sums)
    running.add({name: torch.randn(shape) for name, shape in SHAPES.items()})

    message = running.message()

    assert [tensor.nbytes for tensor in message.values()] == [travelling_bytes(6, sums) + travelling_bytes(5, sums)]


@pytest.mark.parametrize("sums", ["fp32", "fp16"])
def test_running_sum_goes_on_at_its_next_holder_also_where_a_parameter_has_no_gradient_yet(sums):
    generator = torch.Generator().manual_seed(0)
    first, second = ({name: torch.randn(s, generator=generator) for name, s in SHAPES.items()} for _ in range(2))
    stays, goes, comes = (RunningSum(SHAPES, sums) for _ in range(3))
    for running in (stays, goes):
        running.add({"b": first["b"]})
    comes.receive({name: tensor.clone() for name, tensor in goes.message().items()})
    assert list(comes.values()) == ["b"]
    for running in (stays, comes):
        running.add(second)

    exact = {"a": second["a"], "b": first["b"]}
    if sums == "fp16":
        exact["b"] = rounded(first["b"].tolist())[0]
    exact["b"] = exact["b"] + second["b"]
    expected = exact if sums == "fp32" else dict(zip("ab", rounded(*(exact[k].tolist() for k in "ab")), strict=True))
    for running in (stays, comes):
        for found in (running.values(), running.gradients()):
            assert list(found) == ["a", "b"] and all(torch.equal(found[name], expected[name]) for name in "ab")


def test_running_sum_that_nothing_was_added_to_is_zeros_wherever_it_goes():
    running, received = RunningSum(SHAPES, "fp16"), RunningSum(SHAPES, "fp16")

    received.receive(running.message())

    assert received.values() == {}
    assert {name: value.tolist() for name, value in received.gradients().items()} == {
        "a": [[0.0, 0.0]] * 3,
        "b": [0.0] * 5,
    }
