from __future__ import annotations

from pathlib import Path

import pytest

from edge_node.processors import card_memory_bytes
from plutino.errors import ConfigError
from plutino.sizes import MIB


def test_memory_of_a_card_is_asked_of_its_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text('#!/bin/sh\n[ "$1" = --id=3 ] && echo 143771 || { echo "No devices were found"; exit 6; }\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")

    assert card_memory_bytes("3") == 143771 * MIB
    with pytest.raises(ConfigError, match=r"card 7 .*--memory"):
        card_memory_bytes("7")


def test_memory_of_a_card_without_a_driver_says_what_to_give(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))

    with pytest.raises(ConfigError, match="say how much of it workers may take: --memory"):
        card_memory_bytes("0")
