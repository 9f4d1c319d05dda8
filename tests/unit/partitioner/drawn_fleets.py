"""Fleets and links as hypothesis draws them."""

from __future__ import annotations

from hypothesis import strategies as st

from partitioner.device import LinkProfile, LinkTable
from tests.unit.partitioner.fleet import device

LINKS = st.builds(
    lambda bandwidth, latency: LinkTable(other=LinkProfile(bandwidth_bytes_per_s=bandwidth, latency_s=latency)),
    st.sampled_from([5e5, 5e6, 1e9]),
    st.sampled_from([0.0, 1e-3, 2e-2]),
)


def fleets(max_devices):
    one = st.builds(
        lambda speed, available_mib: (speed, available_mib),
        st.sampled_from([0.05, 0.5, 1.0, 1.7, 4.0]),
        st.integers(316, 380),
    )
    return st.lists(one, min_size=1, max_size=max_devices).map(
        lambda numbers: [device(f"d{i}", speed=s, available_mib=a) for i, (s, a) in enumerate(numbers)]
    )
