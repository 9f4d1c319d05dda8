"""The small model and the data set that ship with plutino: what the demo, the examples and the tests run on."""

from __future__ import annotations

from pathlib import Path

ASSETS_DIR = Path(__file__).parent
TINY_LLAMA_DIR = ASSETS_DIR / "models" / "tiny-llama-7m"
SNIPS_DIR = ASSETS_DIR / "data" / "snips"
GENERAL_TEXT = ASSETS_DIR / "data" / "general" / "shakespeare.txt"
