"""Versions of what decides whether two sides understand each other and compute alike."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

from plutino.hardware import FIXED_LIBRARIES

PACKAGES = (*FIXED_LIBRARIES, "grpcio", "protobuf", "plutino")


def installed_versions() -> dict[str, str]:
    """Versions of Python and of the packages that are installed, read from their metadata: nothing is imported."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
