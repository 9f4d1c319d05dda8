"""What ``--json`` prints: one document on one line."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel

from plutino.client import NumberedEvent


def to_json(value: Any) -> str:
    """One line of JSON; knows the client's values, the planner's and the events."""
    return json.dumps(_plain(value), ensure_ascii=False)


def _plain(value: Any) -> Any:
    if isinstance(value, NumberedEvent):
        event = value.event
        return {"number": value.number, "at_s": value.at_s, "kind": event.kind, "event": _plain(event)}
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    return value
