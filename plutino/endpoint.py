"""Where this user's coordinator keeps its state, and where it was last reached."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

from plutino.errors import StoreError, UnreachableError

ENDPOINT_FILE = "endpoint.json"
"""Written into the state folder by the coordinator once it can be reached."""


def default_state_dir() -> Path:
    """State folder of this user's coordinator, by the XDG rules."""
    base = os.environ.get("XDG_STATE_HOME") or str(Path.home() / ".local" / "state")
    return Path(base) / "plutino"


def read_endpoint(state_dir: Path) -> Mapping[str, str]:
    """Addresses of the coordinator of a state folder: ``people_address``, ``devices_address`` and ``bulk_address``.

    Raises:
        UnreachableError: no coordinator has run there.
        StoreError: the file is damaged.
    """
    path = state_dir / ENDPOINT_FILE
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        return {str(key): str(value) for key, value in values.items()}
    except FileNotFoundError:
        raise UnreachableError(
            f"no coordinator has run with the state folder {state_dir}; start one with: plutino up "
            "(or name another folder with --state-dir)"
        ) from None
    except (OSError, ValueError, AttributeError) as error:
        raise StoreError(f"{path} cannot be read ({error}); restart the coordinator, which writes it anew") from error
