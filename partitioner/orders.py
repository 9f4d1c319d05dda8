"""All layouts of a small fleet: which devices form which stage, in every order.

Of devices that cannot be told apart only one order is given.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations, islice

from partitioner.device import DeviceProfile, LinkTable
from partitioner.layout import Group, Layout

MAX_LAYOUTS = 2_000
"""Up to so many layouts all are bounded and the best is proved: six unlike devices in any order make 1,956, five that
may also be replicas 1,081."""


def all_layouts(
    devices: Sequence[DeviceProfile],
    links: LinkTable,
    *,
    max_stages: int,
    exact_stages: int | None = None,
    allow_replicas: bool = False,
) -> list[Layout] | None:
    """Every layout of every subset of the devices; None if there are more than MAX_LAYOUTS.

    In a group the fastest device is replica 0, to which the sum of gradients comes first.
    """
    found = _layouts(devices, links, max_stages, allow_replicas)
    wanted = (layout for layout in found if exact_stages is None or len(layout) == exact_stages)
    if len(devices) > 8:
        return None  # twins apart, 8 devices make 109,600 orders
    first = list(islice(wanted, MAX_LAYOUTS + 1))
    return first if len(first) <= MAX_LAYOUTS else None


def fastest_first(group: Sequence[int], devices: Sequence[DeviceProfile]) -> Group:
    """A group in the order of its replicas: replica 0 generates and uploads the state beside its share.

    The order does not depend on anybody's memory, so that more of it never makes a plan slower.
    """

    def rank(i: int) -> tuple[float, int, int]:
        device = devices[i]
        return (
            # A block of either half: of a model without halves twice the same, which changes no order.
            device.timings.block.both_ways_s + device.timings.decoder_block.both_ways_s,
            device.baseline_bytes - device.available_bytes,
            i,
        )

    return tuple(sorted(group, key=rank))


def have_own_cores(group: Sequence[int], devices: Sequence[DeviceProfile]) -> bool:
    """Whether no two devices of a group compute on the same cores: replicas would only wait for each other."""
    shared = [devices[i].cores_id for i in group if devices[i].cores_id]
    return len(set(shared)) == len(shared)


def with_own_cores(group: Sequence[int], devices: Sequence[DeviceProfile]) -> list[int]:
    """A group without those that compute on the cores of one before them."""
    found: list[int] = []
    for device in group:
        if have_own_cores((*found, device), devices):
            found.append(device)
    return found


def _layouts(
    devices: Sequence[DeviceProfile], links: LinkTable, max_stages: int, allow_replicas: bool
) -> Iterator[Layout]:
    twin_of = twins(devices, links)
    largest = len(devices) if allow_replicas else 1

    def extend(layout: Layout, unused: tuple[int, ...]) -> Iterator[Layout]:
        if layout:
            yield layout
        if len(layout) == max_stages:
            return
        for size in range(1, min(largest, len(unused)) + 1):
            for group in combinations(unused, size):
                if not have_own_cores(group, devices):
                    continue
                # Of several unused twins the first ones stand for all.
                if all(other in group for i in group for other in unused if other < i and twin_of[other] == twin_of[i]):
                    rest = tuple(i for i in unused if i not in group)
                    yield from extend((*layout, fastest_first(group, devices)), rest)

    return extend((), tuple(range(len(devices))))


def twins(devices: Sequence[DeviceProfile], links: LinkTable) -> list[int]:
    """For every device the first one that is like it in every number, links to all others included."""
    matrix = links.matrix(devices)
    same = {"agent_id": "", "name": "", "host_id": ""}
    bare = [device.model_copy(update=same) for device in devices]
    twin_of: list[int] = []
    for i in range(len(devices)):
        alike = (
            j
            for j in range(i)
            if twin_of[j] == j
            and bare[i] == bare[j]
            and all(matrix[i][k] == matrix[j][k] for k in range(len(devices)) if k not in (i, j))
        )
        twin_of.append(next(alike, i))
    return twin_of
