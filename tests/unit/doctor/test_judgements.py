"""Values in, verdicts out: every threshold of a doctor, from both sides."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

from coordinator.doctor import judge_ray
from plutino.doctor.child import ChildRun
from plutino.doctor.judge_machine import judge_disk, judge_limits, judge_memory, judge_processor
from plutino.doctor.kernels import fast_dtypes, judge_kernels
from plutino.doctor.machine import Disk, Memory, Processor
from plutino.doctor.report import Finding, Verdict, as_json, as_text, exit_code, fail, ok, warn
from plutino.doctor.software import judge_fleet_versions, judge_installed, judge_other_side, judge_sqlite
from plutino.doctor.wire import Dialled, Greeting, judge_clock, judge_dial_back, judge_links
from plutino.hardware import WIRE_VERSION

GIB, MIB = 1 << 30, 1 << 20
OK, WARN, FAIL = Verdict.OK, Verdict.WARN, Verdict.FAIL
VERSIONS = {"python": "3.11.7", "torch": "2.13.0", "transformers": "5.23.0", "peft": "0.21.0"}
ALL_VERSIONS = {**VERSIONS, "grpcio": "1.85.1", "protobuf": "7.36.2", "plutino": "0.1.0"}


def memory(total: int, available: int, limit: int | None = None) -> Memory:
    return Memory(total_bytes=total, available_bytes=available, swap_bytes=0, cgroup_limit_bytes=limit)


def processor(quota: float | None = None) -> Processor:
    return Processor(num_cores=8, num_allowed=4, quota_cores=quota)


def disk(free: int = 100 * GIB, *, writable: bool = True, sync_s: float | None = 0.004) -> Disk:
    return Disk(path=Path("/state"), free_bytes=free, is_writable=writable, sync_s=sync_s)


def limits(**changed: int) -> dict[str, int | None]:
    return {"NOFILE": 65536, "DATA": None, "AS": None, "NPROC": None, "STACK": None, **changed}


def clock(skew_s: float, round_trip_s: float = 0.001) -> Finding:
    greeting = Greeting(
        skew_s=skew_s,
        round_trip_s=round_trip_s,
        versions={},
        wire_version=WIRE_VERSION,
        bulk_address="127.0.0.1:1",
        devices=(),
        fleet_versions={},
    )
    return judge_clock(greeting)


def dial(name: str, to: str = "", *, same_host: bool = False, error: str = "") -> Dialled:
    return Dialled(from_device=name, to_device=to, same_host=same_host, seconds=0.002, error=error)


TABLE = [
    ("roomy memory", judge_memory(memory(8 * GIB, 7 * GIB))[0], OK, "8 GiB in all"),
    ("too little memory", judge_memory(memory(512 * MIB, 400 * MIB))[0], FAIL, "a worker needs 600 MiB"),
    ("container too small", judge_memory(memory(8 * GIB, 7 * GIB, 512 * MIB))[0], FAIL, "cgroup limit 512 MiB"),
    ("memory in use", judge_memory(memory(8 * GIB, 300 * MIB))[0], WARN, "300 MiB available"),
    ("budget fits", judge_memory(memory(8 * GIB, 7 * GIB), budget_bytes=6 * GIB)[1], OK, "6 GiB of 8 GiB"),
    ("budget in use", judge_memory(memory(8 * GIB, 5 * GIB), budget_bytes=6 * GIB)[1], WARN, "5 GiB is available"),
    ("budget too large", judge_memory(memory(8 * GIB, 7 * GIB), budget_bytes=9 * GIB)[1], FAIL, "more than there is"),
    ("threads in quota", judge_processor(processor(2.0), threads=2), OK, "quota 2 cores"),
    ("threads over quota", judge_processor(processor(1.0), threads=2), WARN, "threads beyond the quota"),
    ("threads over affinity", judge_processor(processor(), threads=5), WARN, "4 allowed by affinity"),
    ("enough files", judge_limits(limits())[0], OK, "65536 files"),
    ("few files", judge_limits(limits(NOFILE=256))[0], WARN, "256 files"),
    ("capped data", judge_limits(limits(DATA=2 * GIB))[1], WARN, "RLIMIT_DATA is 2 GiB"),
    ("starved data", judge_limits(limits(DATA=100 * MIB))[1], FAIL, "RLIMIT_DATA is 100 MiB"),
    ("starved address space", judge_limits(limits(AS=4 * GIB))[1], FAIL, "RLIMIT_AS is 4 GiB"),
    ("good disk", judge_disk("state", disk()), OK, "fsync 4.0 ms"),
    ("full disk", judge_disk("state", disk(100 * MIB)), FAIL, "at least 1 GiB"),
    ("small disk", judge_disk("state", disk(5 * GIB)), WARN, "5 GiB free"),
    ("read-only disk", judge_disk("state", disk(writable=False)), FAIL, "/state cannot be written"),
    ("slow disk", judge_disk("state", disk(sync_s=0.2)), WARN, "fsync 200.0 ms"),
    ("useless disk", judge_disk("state", disk(sync_s=2.0)), FAIL, "every step waits"),
    ("old python", judge_installed({**ALL_VERSIONS, "python": "3.9.2"}, extra="device")[0], FAIL, "older than 3.10"),
    ("all installed", judge_installed(ALL_VERSIONS, extra="device")[1], OK, "torch 2.13.0"),
    ("no torch", judge_installed({"python": "3.12.1", "grpcio": "1"}, extra="device")[1], FAIL, "torch, transformers"),
    ("same versions", judge_other_side(ALL_VERSIONS, ALL_VERSIONS, other_name="x")[0], OK, "work together"),
    (
        "other torch",
        judge_other_side(ALL_VERSIONS, {**ALL_VERSIONS, "torch": "2.6.0"}, other_name="x")[0],
        WARN,
        "torch 2.13.0 here, 2.6.0 there",
    ),
    (
        "other protocol",
        judge_other_side(VERSIONS, VERSIONS, other_name="x", other_wire_version=WIRE_VERSION + 1)[0],
        FAIL,
        "it refuses this side",
    ),
    ("sound database", judge_sqlite(None), OK, "database sound"),
    ("damaged database", judge_sqlite("row 3 missing from index"), FAIL, "row 3 missing"),
    ("clocks agree", clock(0.01), OK, "0.010 s ahead of"),
    ("clock behind", clock(-5.0), WARN, "5.000 s behind"),
    ("clock far off", clock(3600.0), FAIL, "certificates are refused"),
    ("skew within a slow round trip", clock(2.5, round_trip_s=2.0), OK, "+- 1000.0 ms"),
    ("nobody to dial", judge_dial_back([]), WARN, "no other device"),
    ("dialled from here", judge_dial_back([dial("a", same_host=True)]), WARN, "this machine only"),
    ("dialled from elsewhere", judge_dial_back([dial("a"), dial("b", same_host=True)]), OK, "a in 2.0 ms"),
    ("not reached", judge_dial_back([dial("a"), dial("b", error="no answer")]), FAIL, "b does not reach this device"),
    ("one device", judge_links([]), OK, "fewer than two"),
    ("all linked", judge_links([dial("a", "b"), dial("b", "a")]), OK, "all 2 directions"),
    ("one-way link", judge_links([dial("a", "b"), dial("b", "a", error="no answer")]), FAIL, "1 of 2 directions"),
]


@pytest.mark.parametrize(("finding", "verdict", "measured"), [row[1:] for row in TABLE], ids=[row[0] for row in TABLE])
def test_value_is_judged_and_told_with_its_way_out(finding, verdict, measured):
    assert finding.verdict is verdict, finding
    assert measured in finding.measured
    assert bool(finding.fix) == (verdict is not OK)


def kernel_results(*, bf16_backward_s: float = 0.0002, error: float = 1e-6, **more: object) -> dict[str, object]:
    speed = {"forward_s": 0.0008, "backward_s": 0.0007, "forward_gflops": 80.0, "backward_gflops": 90.0}
    hardware = {"arithmetic": "cpu x86_64 AVX512 amx_bf16", "capability": "AVX512", "idle_accelerators": []}
    return {
        "imports": {"seconds": 4.0, "hardware": hardware},
        "fp32": {**speed, "error": error},
        "bf16": {**speed, "backward_s": bf16_backward_s, "error": 0.003},
        "step": {"imports_s": 5.0, "seconds": 1.0, "resident_bytes": 350 * MIB},
        **more,
    }


def by_name(run: ChildRun) -> dict[str, Finding]:
    return {finding.name: finding for finding in judge_kernels(run)}


def test_kernels_of_a_processor_with_bf16_units_say_that_and_why():
    found = by_name(ChildRun(results=kernel_results()))

    assert {finding.verdict for finding in found.values()} == {OK}
    assert found["fast dtype"].measured.startswith("bf16 (bf16 takes 1 x fp32's time forward and 0.29 x backward")
    assert "amx_bf16" in found["fast dtype"].measured


def test_kernels_of_a_processor_without_bf16_units_leave_bf16_out():
    results = kernel_results(bf16_backward_s=0.2)

    assert fast_dtypes(results) == ["fp32"]
    assert by_name(ChildRun(results=results))["fast dtype"].measured.startswith("fp32 ")


def test_kernels_that_compute_nonsense_fail():
    assert by_name(ChildRun(results=kernel_results(error=float("nan"))))["fp32 kernels"].verdict is FAIL


@pytest.mark.parametrize(
    ("told", "run", "name", "measured"),
    [
        ([], {"exit_code": 1, "last_words": "ModuleNotFoundError: No module named 'torch'"}, "torch", "No module"),
        (["imports"], {"exit_code": -signal.SIGILL}, "fp32 kernels", "illegal instruction"),
        (["imports", "fp32"], {"exit_code": -signal.SIGSEGV}, "bf16 kernels", "SIGSEGV"),
        (["imports", "fp32", "bf16"], {"exit_code": -9, "timed_out": True}, "training step", "did not finish"),
        (["imports", "fp32", "bf16", "step"], {"exit_code": -signal.SIGABRT}, "accelerator kernels", "SIGABRT"),
    ],
)
def test_probe_that_died_fails_at_what_killed_it(told, run, name, measured):
    results = {key: value for key, value in kernel_results().items() if key in told}

    found = by_name(ChildRun(results=results, **run))

    assert found[name].verdict is FAIL
    assert measured in found[name].measured
    assert found[name].fix


def test_card_that_torch_does_not_see_is_told():
    results = kernel_results()
    results["imports"]["hardware"]["idle_accelerators"] = ["cuda Jetson Orin Nano"]

    assert by_name(ChildRun(results=results))["CUDA"].verdict is WARN


def test_card_whose_kernels_fail_is_a_failure_and_one_that_works_is_named():
    card = {"name": "NVIDIA H200", "capability": "9.0", "memory_bytes": 139 * GIB}
    speed = kernel_results()["fp32"]
    works = kernel_results(cuda={"hardware": card, "fp32": speed, "bf16": speed})
    broken = kernel_results(cuda={"error": "no kernel image is available for execution on the device"})

    assert "NVIDIA H200, compute capability 9.0, 139 GiB" in by_name(ChildRun(results=works))["CUDA"].measured
    assert by_name(ChildRun(results=works))["CUDA bf16 kernels"].verdict is OK
    assert by_name(ChildRun(results=broken))["CUDA"].verdict is FAIL


@pytest.mark.parametrize(
    ("results", "run", "verdict", "measured"),
    [
        (
            {},
            {"exit_code": 1, "last_words": "No package metadata was found for ray"},
            FAIL,
            "is not installed: No package",
        ),
        ({"installed": {"version": "2.60.0"}}, {"exit_code": -9, "timed_out": True}, FAIL, "took too long"),
        ({"installed": {"version": "2.60.0"}, "start": {"seconds": 3.0}}, {"exit_code": 1}, WARN, "its end failed"),
        ({"installed": {"version": "2.60.0"}, "start": {"seconds": 3.0}}, {}, OK, "starts in 3.0 s"),
    ],
)
def test_ray_is_judged_by_how_far_it_came(results, run, verdict, measured):
    finding = judge_ray(ChildRun(results=results, **run))

    assert (finding.verdict, measured in finding.measured) == (verdict, True)


def test_fleet_of_mixed_versions_is_told_with_who_runs_what():
    devices = [{"name": "a", "versions": VERSIONS}, {"name": "b", "versions": VERSIONS}]
    old = {"name": "pi", "versions": {**VERSIONS, "torch": "2.6.0"}}

    assert judge_fleet_versions(devices)[0].verdict is OK
    (mixed,) = judge_fleet_versions([*devices, old])
    assert mixed.verdict is WARN
    assert "pi: torch==2.6.0" in mixed.measured
    assert "torch==2.13.0" in mixed.fix


def test_report_fails_only_for_a_failure_and_is_one_json_document():
    findings = [ok("a", "1"), warn("b", "2", "mend b")]

    assert exit_code(findings) == 0
    assert exit_code([*findings, fail("c", "3", "mend c")]) == 1
    assert json.loads(as_json(findings)) == {
        "findings": [
            {"name": "a", "verdict": "ok", "measured": "1", "fix": ""},
            {"name": "b", "verdict": "warn", "measured": "2", "fix": "mend b"},
        ],
        "exit_code": 0,
    }
    assert "fix: mend b" in as_text(findings)
    assert as_text(findings).endswith("1 ok, 1 warn, 0 fail")
