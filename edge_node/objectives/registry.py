"""All objectives, by the ``type`` of their config."""

from __future__ import annotations

from collections.abc import Callable

from edge_node.objectives.base import Objective
from edge_node.objectives.sft import SftObjective

OBJECTIVES: dict[str, Callable[[], Objective]] = {"sft": SftObjective}
