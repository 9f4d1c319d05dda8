"""Which devices to try in which order: all orders of a small fleet, a few sensible ones of a large one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from partitioner.device import DeviceProfile, LinkTable

MAX_EXHAUSTIVE_DEVICES = 6
"""Up to here every order of every subset is tried (1,956 for six unlike devices)."""

Order = tuple[int, ...]
"""Positions in the list of devices, first stage first."""


def device_orders(devices: Sequence[DeviceProfile], links: LinkTable, num_stages: int) -> list[Order]:
    """Orders of ``num_stages`` devices worth a search.

    Of devices that cannot be told apart only one order is given. In a fleet of more than MAX_EXHAUSTIVE_DEVICES the
    fastest and the roomiest devices are taken, the fastest first or the roomiest first: early stages hold the most
    micro-batches.
    """
    if len(devices) <= MAX_EXHAUSTIVE_DEVICES:
        return list(_arrangements(_twins(devices, links), num_stages))
    by_speed = sorted(range(len(devices)), key=lambda i: _seconds(devices[i]))
    by_room = sorted(range(len(devices)), key=lambda i: -_room_bytes(devices[i]))
    orders = []
    for chosen in (by_speed[:num_stages], by_room[:num_stages]):
        orders.append(tuple(sorted(chosen, key=lambda i: _seconds(devices[i]))))
        orders.append(tuple(sorted(chosen, key=lambda i: -_room_bytes(devices[i]))))
    return list(dict.fromkeys(orders))


def _arrangements(twin_of: Sequence[int], num_stages: int) -> Iterator[Order]:
    def extend(order: Order) -> Iterator[Order]:
        if len(order) == num_stages:
            yield order
            return
        seen: set[int] = set()
        for i, twin in enumerate(twin_of):
            # Of several unused twins the first stands for all.
            if i not in order and twin not in seen:
                seen.add(twin)
                yield from extend((*order, i))

    return extend(())


def _twins(devices: Sequence[DeviceProfile], links: LinkTable) -> list[int]:
    """For every device the first one that is like it in every number, links to all others included."""
    twin_of: list[int] = []
    for i in range(len(devices)):
        twin_of.append(next((j for j in range(i) if twin_of[j] == j and _alike(devices, links, j, i)), i))
    return twin_of


def _alike(devices: Sequence[DeviceProfile], links: LinkTable, i: int, j: int) -> bool:
    same = {"agent_id": "", "name": "", "host_id": ""}
    if devices[i].model_copy(update=same) != devices[j].model_copy(update=same):
        return False
    others = [device for k, device in enumerate(devices) if k not in (i, j)]
    return all(links.between(devices[i], other) == links.between(devices[j], other) for other in others)


def _seconds(device: DeviceProfile) -> float:
    return device.timings.forward_s + device.timings.backward_s


def _room_bytes(device: DeviceProfile) -> int:
    return device.available_bytes - device.baseline_bytes
