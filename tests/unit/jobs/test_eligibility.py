from __future__ import annotations

from dataclasses import replace

import pytest

from coordinator.fleet.membership import Device
from coordinator.jobs.eligibility import Eligible, agreed_versions, eligible, shared_arithmetic
from plutino.hardware import Hardware
from plutino.job.numerics import NumericsRecord
from plutino.types import AgentId

VERSIONS = {"torch": "2.13.0", "transformers": "5.23.0", "peft": "0.21.0"}
ARITHMETIC = "cpu x86_64 GenuineIntel AVX512 amx_bf16"
LAPTOP = Device(
    agent_id=AgentId("a-laptop"),
    name="laptop",
    host_id="h1",
    memory_budget_bytes=4 << 30,
    baseline_bytes=350 << 20,
    threads=4,
    versions=VERSIONS,
    dtypes=("bf16", "fp32"),
    hardware=Hardware(arithmetic=ARITHMETIC),
)
RECORD = NumericsRecord(
    dtype="bf16",
    attention="sdpa",
    micro_batch_size=4,
    threads_per_worker=4,
    codecs="raw",
    versions=VERSIONS,
    arithmetic=ARITHMETIC,
)


def other(name: str, **changes: object) -> Device:
    return replace(LAPTOP, agent_id=AgentId(f"a-{name}"), name=name, **changes)  # type: ignore[arg-type]


def sort(*devices: Device, numerics: NumericsRecord | None = None, **rules: object) -> Eligible:
    rules = {"wanted_names": (), "excluded": {}, **rules}
    return eligible(devices, numerics=numerics, **rules)  # type: ignore[arg-type]


def names(found: Eligible) -> list[str]:
    return [device.name for device in found.devices]


CANNOT_HONOUR = [
    ({"dtypes": ("fp32",)}, "does not run bf16, only fp32; the numerics record fixes bf16"),
    ({"versions": {**VERSIONS, "torch": "2.6.0"}}, "has torch 2.6.0 instead of 2.13.0"),
    ({"versions": {"torch": "2.13.0", "transformers": "5.23.0"}}, "has peft not installed instead of 0.21.0"),
    ({"threads": 2}, "has 2 threads, the numerics record fixes 4"),
    ({"hardware": Hardware(kind="cuda", arithmetic="cuda H200 sm_90")}, "computes on cuda H200 sm_90, the numerics"),
    ({"hardware": Hardware(arithmetic="cpu aarch64 0xd0b NEON")}, "computes on cpu aarch64 0xd0b NEON"),
    ({"hardware": Hardware()}, "computes on hardware that it does not name"),
]


@pytest.mark.parametrize(("changes", "reason"), CANNOT_HONOUR)
def test_device_that_cannot_honour_the_record_is_left_out_with_that_reason(changes, reason):
    found = sort(LAPTOP, other("odd", **changes), numerics=RECORD)

    assert names(found) == ["laptop"]
    assert [one.what for one in found.left_out] == ["odd"]
    assert reason in found.left_out[0].why


def test_record_of_a_mixed_first_plan_lets_any_hardware_take_part():
    card = other("card", hardware=Hardware(kind="cuda", arithmetic="cuda H200 sm_90"))
    mixed = RECORD.model_copy(update={"arithmetic": shared_arithmetic([LAPTOP, card])})

    assert mixed.arithmetic is None
    assert names(sort(LAPTOP, card, numerics=mixed)) == ["laptop", "card"]


def test_arithmetic_of_equal_devices_is_fixed():
    assert shared_arithmetic([LAPTOP, other("twin")]) == ARITHMETIC


def test_first_plan_runs_the_versions_of_most_memory_and_names_who_differs():
    old = {**VERSIONS, "transformers": "5.0.0"}
    found = sort(other("old-1", versions=old), LAPTOP, other("small", versions=old, memory_budget_bytes=1 << 30))

    assert names(found) == ["old-1", "small"]
    assert found.reasons().startswith("laptop: has transformers 5.23.0 instead of 5.0.0")


def test_first_plan_of_equal_memory_runs_the_newest_versions():
    assert agreed_versions([other("old", versions={"torch": "2.6.0"}), other("new", versions={"torch": "2.13.0"})]) == {
        "torch": "2.13.0"
    }


def test_device_that_is_not_wanted_or_given_up_says_so():
    found = sort(
        LAPTOP,
        other("desk"),
        other("pi"),
        wanted_names=("laptop", "pi"),
        excluded={AgentId("a-pi"): "ran out of memory"},
    )

    assert names(found) == ["laptop"]
    assert {one.what: one.why for one in found.left_out} == {
        "desk": "is not among placement.devices",
        "pi": "ran out of memory",
    }
