"""The base of the planner's values: frozen, strict, and able to cross a process border as JSON."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class PlanValue(BaseModel):
    """A value that goes into the planner or comes out of it."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)
