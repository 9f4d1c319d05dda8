from __future__ import annotations

import pytest

from edge_node.sources.order import MEASURED_BYTES, Delivered, order_sources

NAMES = ["hub", "device a", "coordinator"]


def at(mib_per_s: float) -> Delivered:
    return Delivered(MEASURED_BYTES, MEASURED_BYTES / (mib_per_s * 2**20))


def test_preferred_order_holds_before_anything_is_measured():
    assert order_sources(NAMES, {}) == NAMES
    assert order_sources(NAMES, {"hub": Delivered(MEASURED_BYTES - 1, 1.0)}) == NAMES


def test_later_source_is_tried_once_when_the_first_has_been_measured():
    assert order_sources(NAMES, {"hub": at(10)}) == ["device a", "hub", "coordinator"]
    assert order_sources(NAMES, {"hub": at(10), "device a": Delivered(1, 1.0)}) == ["coordinator", "hub", "device a"]


@pytest.mark.parametrize(
    ("speeds", "order"),
    [
        ((10, 11, 19), NAMES),
        ((10, 11, 20), ["hub", "device a", "coordinator"]),
        ((10, 30, 20), ["device a", "coordinator", "hub"]),
        ((1, 30, 100), ["coordinator", "device a", "hub"]),
    ],
    ids=["alike", "not twice the one before", "device", "coordinator"],
)
def test_much_faster_source_goes_first(speeds, order):
    assert order_sources(NAMES, {name: at(speed) for name, speed in zip(NAMES, speeds, strict=True)}) == order
