from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import pytest

from edge_node.hardware import describe_cpu
from plutino.hardware import WIRE_VERSION, Hardware, wire_refusal
from plutino.wire.hardware import hardware_from_proto, hardware_to_proto


def procfs(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


def test_raspberry_pi_is_named_by_its_board_and_rounds_by_its_core(tmp_path, monkeypatch):
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    cpuinfo = "processor\t: 0\nFeatures\t: fp asimd asimdhp asimddp crc32\nCPU part\t: 0xd0b\n"
    proc = procfs(tmp_path, {"cpuinfo": cpuinfo, "device-tree/model": "Raspberry Pi 5 Model B Rev 1.0\0"})

    found = describe_cpu("DEFAULT", proc)

    assert (found.name, found.machine) == ("Raspberry Pi 5 Model B Rev 1.0", "aarch64")
    assert found.arithmetic == "cpu aarch64 0xd0b DEFAULT asimd asimdhp asimddp"
    assert found.idle_accelerators == ()


def test_processors_with_other_kernels_do_not_count_as_alike(tmp_path, monkeypatch):
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    cpuinfo = "vendor_id\t: GenuineIntel\nmodel name\t: Xeon\nflags\t\t: fpu avx2 {}\n"
    plain = describe_cpu("AVX2", procfs(tmp_path / "a", {"cpuinfo": cpuinfo.format("")}))
    matrix = describe_cpu("AVX2", procfs(tmp_path / "b", {"cpuinfo": cpuinfo.format("amx_bf16")}))

    assert plain.name == matrix.name == "Xeon"
    assert plain.arithmetic != matrix.arithmetic


def test_idle_cards_and_a_jetson_are_seen_without_a_driver(tmp_path):
    card = procfs(tmp_path / "pc", {"driver/nvidia/gpus/0000:01:00.0/information": "Model: \t\t NVIDIA H200\nIRQ: 1\n"})
    jetson = procfs(
        tmp_path / "jetson",
        {"device-tree/compatible": "nvidia,p3768\0nvidia,tegra234\0", "device-tree/model": "Jetson Orin Nano\0"},
    )

    assert describe_cpu("", card).idle_accelerators == ("cuda NVIDIA H200",)
    assert describe_cpu("", jetson).idle_accelerators == ("cuda Jetson Orin Nano",)


def test_hardware_survives_the_pipe_and_the_wire(tmp_path):
    hardware = describe_cpu("AVX512")

    assert Hardware.from_values(asdict(hardware)) == hardware
    assert hardware_from_proto(hardware_to_proto(hardware)) == hardware


@pytest.mark.parametrize("broken", [{}, {"kind": 1}, {"idle_accelerators": "cuda"}, {"memory_bytes": "1"}])
def test_malformed_hardware_of_a_worker_is_refused(broken):
    values = {**asdict(Hardware()), **broken} if broken else {}

    with pytest.raises(ValueError, match=r"hardware|accelerators"):
        Hardware.from_values(values)


def test_another_protocol_is_refused_in_words():
    assert wire_refusal("pi", WIRE_VERSION) is None
    assert "upgrade the device's plutino" in (wire_refusal("pi", WIRE_VERSION - 1) or "")
    assert "upgrade the coordinator's plutino" in (wire_refusal("pi", WIRE_VERSION + 1) or "")
