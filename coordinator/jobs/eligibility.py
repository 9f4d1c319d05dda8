"""Which devices may take part in a job, and why the others may not: pure.

Once a job has its numerics record, a device that cannot honour it is left out. Before that, the devices agree: all
workers of a job run the same torch, transformers and peft, so where devices differ, the versions of those that offer
the most memory together are taken.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from coordinator.fleet.membership import Device
from partitioner.plan import RejectedPlan
from plutino.dtypes import why_not_run
from plutino.hardware import FIXED_LIBRARIES
from plutino.job.numerics import NumericsRecord
from plutino.types import AgentId


@dataclass(frozen=True, slots=True, kw_only=True)
class Eligible:
    """The devices to plan over, and the others with their reasons."""

    devices: tuple[Device, ...]
    left_out: tuple[RejectedPlan, ...]

    def reasons(self) -> str:
        """Why the others are left out, for an error message; empty if none is."""
        return "; ".join(f"{one.what}: {one.why}" for one in self.left_out)


def eligible(
    devices: Sequence[Device],
    *,
    wanted_names: Collection[str],
    numerics: NumericsRecord | None,
    excluded: Mapping[AgentId, str],
) -> Eligible:
    """Sort devices into those that may take part and those that may not.

    Args:
        devices: devices that are alive.
        wanted_names: the job's placement.devices; empty means any.
        numerics: what fixes the job's bits; None at its first plan, or where the job leaves them free.
        excluded: devices that the job has given up, with the reason.
    """
    usable: list[Device] = []
    left_out: list[RejectedPlan] = []
    for device in devices:
        why = _unwanted(device, wanted_names, excluded)
        if why is None and numerics is not None:
            why = _breaks(device, numerics)
        if why is None:
            usable.append(device)
        else:
            left_out.append(RejectedPlan(what=device.name, why=why))
    if numerics is None:
        agreed = agreed_versions(usable)
        for device in usable[:]:
            if (differs := _differing_version(device, agreed)) is not None:
                usable.remove(device)
                why = f"{differs}, which the devices with the most memory together run; install the same there"
                left_out.append(RejectedPlan(what=device.name, why=why))
    return Eligible(devices=tuple(usable), left_out=tuple(left_out))


def agreed_versions(devices: Sequence[Device]) -> dict[str, str]:
    """The versions that a job's workers shall run: those whose devices offer most memory, then the newest."""
    offered: dict[tuple[str, ...], tuple[int, dict[str, str]]] = {}
    for device in devices:
        found = {name: device.versions[name] for name in FIXED_LIBRARIES if name in device.versions}
        key = tuple(f"{name} {version}" for name, version in found.items())
        offered[key] = (offered.get(key, (0, found))[0] + device.memory_budget_bytes, found)
    if not offered:
        return {}
    return max(offered.values(), key=lambda one: (one[0], [_ordered(version) for version in one[1].values()]))[1]


def shared_arithmetic(devices: Sequence[Device]) -> str | None:
    """What all the devices round by; None where they differ or do not say."""
    found = {device.hardware.arithmetic for device in devices}
    return (found.pop() or None) if len(found) == 1 else None


def _unwanted(device: Device, wanted_names: Collection[str], excluded: Mapping[AgentId, str]) -> str | None:
    if wanted_names and device.name not in wanted_names:
        return "is not among placement.devices"
    return excluded.get(device.agent_id)


def _breaks(device: Device, numerics: NumericsRecord) -> str | None:
    if numerics.dtype not in device.dtypes:
        why = why_not_run(numerics.dtype, device.dtypes, device.slow_dtypes)
        return f"{why}; the numerics record fixes {numerics.dtype}"
    if (differs := _differing_version(device, numerics.versions)) is not None:
        return f"{differs}, which the numerics record fixes"
    if numerics.threads_per_worker is not None and device.threads < numerics.threads_per_worker:
        return f"has {device.threads} threads, the numerics record fixes {numerics.threads_per_worker}"
    if numerics.arithmetic is not None and device.hardware.arithmetic != numerics.arithmetic:
        return (
            f"computes on {device.hardware.arithmetic or 'hardware that it does not name'}, the numerics record fixes "
            f"{numerics.arithmetic}; placement.numerics: free lets it take part"
        )
    return None


def _differing_version(device: Device, versions: Mapping[str, str]) -> str | None:
    for library, wanted in versions.items():
        found = device.versions.get(library)
        if found != wanted:
            return f"has {library} {found or 'not installed'} instead of {wanted}"
    return None


def _ordered(version: str) -> list[tuple[int, str]]:
    """A key under which 2.13.0 is newer than 2.6.0; local parts such as +cpu count last."""
    return [(int(part) if part.isdigit() else -1, part) for part in version.replace("+", ".").split(".")]
