"""``method: auto``: a job that leaves its method to the coordinator, and what was priced before it was chosen."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from plutino.job.base import SpecPart

AUTO = "auto"


class PricedMethod(SpecPart):
    """A method as it would run on the devices that are in."""

    method: str
    """With what goes with it, in words."""
    why_not: str = ""
    """Why it cannot be taken; empty if it can, and then all that follows is known."""
    task_s: float = 0.0
    """Predicted seconds of all steps."""
    step_s: float = 0.0
    """Of a step of the first epoch."""
    later_step_s: float = 0.0
    """Of a step of the later ones."""
    peak_bytes: int = 0
    """Of the worker that needs most memory."""
    sent_bytes: int = 0
    """Over all links in a step of the first epoch, both ways."""
    cache_bytes: int = 0
    """At most, on the devices' disks."""
    trained_params: int = 0


class AutoMethod(SpecPart):
    """Beside the method that was taken; the coordinator fills it in when the job is handed in."""

    why: str = ""
    """Why the method is the one; empty: nothing was chosen yet."""
    num_steps: int = 0
    """Of the whole task."""
    candidates: tuple[PricedMethod, ...] = ()

    @property
    def is_open(self) -> bool:
        """Whether the method beside it only stands where the chosen one will."""
        return not self.why


def spelled_out(values: Mapping[str, Any], stand_in: str) -> Mapping[str, Any]:
    """The values of a job spec with ``method: auto`` as the parts that it stands for.

    Args:
        values: as a person wrote them.
        stand_in: type of the method that stands where the chosen one will.

    Raises:
        ValueError: the method is left open and has settings.
    """
    method = values.get("method")
    if method == AUTO:
        method = {"type": AUTO}
    if not isinstance(method, Mapping) or method.get("type") != AUTO:
        return values
    if settings := sorted(method.keys() - {"type"}):
        raise ValueError(
            f"method.{settings[0]} is a setting of one method, and method: auto chooses among several, each with its "
            "defaults; name the method, or leave its settings out"
        )
    return {**values, "method": {"type": stand_in}, "auto_method": {}}
