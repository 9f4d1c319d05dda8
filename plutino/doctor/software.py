"""Versions: what is installed here against what plutino asks for and what the other side runs. Pure."""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping, Sequence

from plutino.doctor.report import Finding, fail, ok, warn
from plutino.hardware import FIXED_LIBRARIES, WIRE_VERSION

LEAST_PYTHON = (3, 10)
_LEAST_SQLITE = (3, 22)
"""First that reads a database in use without writing beside it; 2018."""


def judge_installed(versions: Mapping[str, str], *, extra: str) -> list[Finding]:
    """Whether what a device or a coordinator needs is installed.

    Args:
        versions: of :func:`plutino.versions.installed_versions`.
        extra: plutino's optional dependencies of this side: ``device`` or ``coordinator``.
    """
    python = tuple(int(part) for part in versions["python"].split(".")[:2])
    findings = [ok("python", versions["python"])]
    if python < LEAST_PYTHON:
        least = ".".join(str(part) for part in LEAST_PYTHON)
        fix = f"install Python {least} or newer and make the environment with it (python{least} -m venv)"
        findings = [fail("python", f"{versions['python']} is older than {least}", fix)]
    missing = [name for name in (*FIXED_LIBRARIES, "grpcio", "protobuf") if name not in versions]
    said = ", ".join(f"{name} {version}" for name, version in versions.items() if name != "python")
    if missing:
        fix = f"pip install 'plutino[{extra}]'"
        return [*findings, fail("libraries", f"{', '.join(missing)} missing; {said}", fix)]
    return [*findings, ok("libraries", said)]


def judge_other_side(
    versions: Mapping[str, str],
    other: Mapping[str, str],
    *,
    other_name: str,
    other_wire_version: int = WIRE_VERSION,
) -> list[Finding]:
    """Whether two sides understand each other, and whether they would compute alike."""
    name = f"versions of {other_name}"
    if other_wire_version != WIRE_VERSION:
        return [
            fail(
                name,
                f"speaks version {other_wire_version} of the protocol, this side {WIRE_VERSION}: it refuses this side",
                f"pip install 'plutino=={other.get('plutino', 'SAME VERSION')}'",
            )
        ]
    differing = [lib for lib in FIXED_LIBRARIES if lib in other and versions.get(lib) != other[lib]]
    if differing:
        said = ", ".join(f"{lib} {versions.get(lib, 'missing')} here, {other[lib]} there" for lib in differing)
        wanted = " ".join(f"'{lib}=={other[lib]}'" for lib in differing)
        return [warn(name, f"{said}: no job runs on both", f"pip install {wanted}")]
    shared = [f"{lib} {other[lib]}" for lib in (*FIXED_LIBRARIES, "grpcio", "plutino") if lib in other]
    return [ok(name, f"work together: protocol {WIRE_VERSION}, {', '.join(shared)}")]


def judge_fleet_versions(devices: Sequence[Mapping[str, object]]) -> list[Finding]:
    """Whether the devices that are in can work on one job; each value has ``name`` and ``versions``."""
    by_versions: dict[tuple[str, ...], list[str]] = {}
    for device in devices:
        versions = device["versions"]
        assert isinstance(versions, Mapping)
        key = tuple(f"{lib}=={versions.get(lib, '?')}" for lib in FIXED_LIBRARIES)
        by_versions.setdefault(key, []).append(str(device["name"]))
    if not by_versions:
        return []
    if len(by_versions) == 1:
        (key,) = by_versions
        return [ok("versions of the devices", f"{len(devices)} alike: {', '.join(key)}")]
    said = "; ".join(f"{', '.join(names)}: {', '.join(key)}" for key, names in by_versions.items())
    most = max(by_versions, key=lambda key: len(by_versions[key]))
    fix = f"on the others: pip install {' '.join(most)}"
    return [warn("versions of the devices", f"no job runs on all: {said}", fix)]


def judge_sqlite(damage: str | None) -> Finding:
    """The library's version, and what it says of the database."""
    version = tuple(int(part) for part in sqlite3.sqlite_version.split(".")[:2])
    if version < _LEAST_SQLITE:
        fix = "install a newer libsqlite3, or a Python that brings its own (python.org, uv)"
        return fail("SQLite", f"{sqlite3.sqlite_version} is older than 3.22", fix)
    if damage is not None:
        fix = "end the coordinator, restore plutino.sqlite from a copy, or start with another --state-dir"
        return fail("SQLite", f"{sqlite3.sqlite_version}; the database is damaged: {damage}", fix)
    return ok("SQLite", f"{sqlite3.sqlite_version}, database sound")
