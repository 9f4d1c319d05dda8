"""What a benchmark is to show, beside what it showed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Goal:
    """A measured number and the bounds it is wanted in."""

    name: str
    measured: float
    unit: str = ""
    at_least: float | None = None
    """None: nothing is too little."""
    at_most: float | None = None
    """None: nothing is too much."""

    @property
    def is_met(self) -> bool:
        """Whether the number lies within its bounds."""
        too_little = self.at_least is not None and self.measured < self.at_least
        too_much = self.at_most is not None and self.measured > self.at_most
        return not (too_little or too_much)

    @property
    def wanted(self) -> str:
        """The bounds in words."""
        bounds = [f">= {self.at_least:g}"] if self.at_least is not None else []
        bounds += [f"<= {self.at_most:g}"] if self.at_most is not None else []
        return " and ".join(bounds) + (f" {self.unit}" if self.unit else "")

    def to_dict(self) -> dict[str, object]:
        """For JSON."""
        return {"name": self.name, "measured": self.measured, "wanted": self.wanted, "is_met": self.is_met}


def goal_table(goals: Sequence[Goal]) -> str:
    """Plain text, a line a goal."""
    width = max(len(goal.name) for goal in goals)
    lines = [f"{'goal':<{width}} {'measured':>10}  wanted"]
    lines += [
        f"{goal.name:<{width}} {goal.measured:>10.3f}  {goal.wanted}: {'met' if goal.is_met else 'MISSED'}"
        for goal in goals
    ]
    return "\n".join(lines)
