"""What ``benchmarks.methods`` compares: the rows of its tables, their tasks, and single trainings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks.method_training import Part

_NARROW = (1e-3, 3e-3, 1e-2, 3e-2)
_VIRTUAL = (1e-2, 3e-2, 1e-1, 3e-1)


@dataclass(frozen=True, slots=True)
class Row:
    """A method of the table."""

    method: Mapping[str, Any]
    rates: tuple[float, ...] = _NARROW
    has_peft: bool = False
    quantization: str = "none"
    num_virtual_tokens: int = 0
    cache: str = "off"
    """Codec of the activation cache."""
    epochs_factor: int = 1
    """How many times the others' epochs it is trained."""


_LORA = {"type": "lora", "rank": 16, "alpha": 32}
ROWS: Mapping[str, Row] = {
    "lora": Row(_LORA, has_peft=True),
    "lora, rslora": Row({**_LORA, "use_rslora": True}, has_peft=True),
    "lora, dora": Row({**_LORA, "use_dora": True}, has_peft=True),
    "lora on nf4": Row(_LORA, quantization="nf4"),
    "lora, unfrozen from the top": Row({**_LORA, "unfreeze": {"every_steps": 8, "blocks": 1}}),
    "adapters, pfeiffer": Row({"type": "adapters", "placement": "pfeiffer", "bottleneck": 32}),
    "adapters, houlsby": Row({"type": "adapters", "placement": "houlsby", "bottleneck": 32}),
    "parallel_adapters": Row({"type": "parallel_adapters", "reduction": 4}),
    "prefix, projected": Row(
        {"type": "prefix", "num_virtual_tokens": 20, "projection": True, "encoder_hidden_size": 256},
        has_peft=True,
        num_virtual_tokens=20,
    ),
    "p_tuning_v2": Row({"type": "p_tuning_v2", "num_virtual_tokens": 20}, _VIRTUAL, True, num_virtual_tokens=20),
    "prompt": Row({"type": "prompt", "num_virtual_tokens": 20}, _VIRTUAL, True, num_virtual_tokens=20),
    "full": Row({"type": "full"}, (1e-4, 3e-4, 1e-3, 3e-3), has_peft=True),
}


@dataclass(frozen=True, slots=True)
class Task:
    """What is learnt, as the demo learns it."""

    suffix: str
    metric: str
    max_new_tokens: int
    steps: int


TASKS = {"intent": Task("", "exact_match", 12, 100), "json": Task("_json", "json_slots", 120, 150)}


@dataclass(frozen=True, slots=True, order=True)
class Cell:
    """One training; sorted by what is wanted first."""

    group: int
    """Position of its table."""
    order: int
    """0 for those that others wait for, then by seed."""
    model: str
    task: str
    row: str
    system: str
    part: Part
    rate: float
    seed: int

    @property
    def name(self) -> str:
        """Of its files."""
        row = self.row.replace(", ", "_").replace(" ", "_")
        return f"{self.model}-{self.task}-{row}-{self.system}-{self.part}-{self.rate:g}-{self.seed}"
