"""The units: as systemd reads them where it is installed, and as the programs that they start read their options."""

from __future__ import annotations

import configparser
import re
import shutil
import subprocess
from pathlib import Path

import pytest

UNITS_DIR = Path(__file__).resolve().parents[3] / "deploy" / "systemd"
SYSTEM_UNITS = sorted(UNITS_DIR.glob("*.service"))
UNITS = [*SYSTEM_UNITS, *sorted((UNITS_DIR / "user").glob("*.service"))]
MOST_EXPOSED = 2.0
"""systemd-analyze security: 0 is a closed box, 10 an open one; what it calls OK is below 4.4."""
_BINARIES = re.compile(r"^ExecStart=\S+/bin/(plutino|plutino-node) ", re.MULTILINE)

needs_systemd = pytest.mark.skipif(
    shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed on this machine"
)


def read(unit: Path) -> configparser.ConfigParser:
    parser = configparser.ConfigParser(strict=False, interpolation=None, comment_prefixes=("#",))
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read(unit)
    return parser


@needs_systemd
@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: str(unit.relative_to(UNITS_DIR)))
def test_unit_is_understood_by_systemd_without_a_complaint(unit, tmp_path):
    # systemd asks that the programs exist, which are wherever their owner installed them.
    text = _BINARIES.sub(r"ExecStart=/bin/true ", unit.read_text())
    (tmp_path / unit.name).write_text(text)
    shutil.copytree(UNITS_DIR, tmp_path, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.service", "user"))
    user = ["--user"] if unit.parent.name == "user" else []

    ended = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", "--recursive-errors=no", *user, str(tmp_path / unit.name)],
        capture_output=True,
        text=True,
        timeout=30,
        env={"PATH": "/usr/bin:/bin", "XDG_RUNTIME_DIR": str(tmp_path), "HOME": str(tmp_path)},
    )

    assert (ended.returncode, ended.stdout + ended.stderr) == (0, "")


@needs_systemd
@pytest.mark.parametrize("unit", SYSTEM_UNITS, ids=lambda unit: unit.name)
def test_system_unit_is_hardened_by_systemds_own_measure(unit):
    ended = subprocess.run(
        ["systemd-analyze", "security", "--offline=true", f"--threshold={MOST_EXPOSED * 10:.0f}", str(unit)],
        capture_output=True,
        text=True,
        timeout=30,
    )

    assert ended.returncode == 0, ended.stdout[-400:] + ended.stderr


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: str(unit.relative_to(UNITS_DIR)))
def test_unit_starts_a_command_line_that_its_program_takes(unit):
    from coordinator.cli import app
    from edge_node.cli import _parser

    program, *words = read(unit)["Service"]["ExecStart"].split()
    words = [word.replace("%S", "/var/lib") for word in words]

    if program.endswith("/plutino-node"):
        assert _parser().parse_args(words).command
    else:
        import typer.main

        command, *options = words
        with typer.main.get_command(app).commands[command].make_context(command, options) as context:  # type: ignore[attr-defined]
            assert str(context.params["state_dir"]) == "/var/lib/plutino"


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: str(unit.relative_to(UNITS_DIR)))
def test_unit_needs_no_root_and_ends_its_children_in_good_order(unit):
    service = read(unit)["Service"]

    assert "User" not in service
    assert service["NoNewPrivileges"] == "yes"
    assert service["KillMode"] == "mixed"
    if "agent" in unit.name:
        assert service["OOMPolicy"] == "continue"
    # oneDNN writes its kernels at run time.
    assert "MemoryDenyWriteExecute" not in service
