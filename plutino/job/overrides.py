"""Settings given beside a job file: ``training.steps=50`` on the command line.

Entry point: :func:`apply_overrides`. It only places values; the spec's own validation judges them, so that an unknown
key is told the same way wherever it is written.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from plutino.errors import ConfigError
from plutino.yaml_text import read_yaml


def apply_overrides(
    values: Mapping[str, Any], overrides: Iterable[str], *, path_keys: Iterable[str], base_dir: Path
) -> dict[str, Any]:
    """A job spec's values with ``key=value`` settings placed into them; the given mapping stays as it is.

    Args:
        values: what the job file says.
        overrides: dotted key, ``=``, value in YAML: ``training.steps=50``, ``placement.devices=[a, b]``,
            ``scoring=null``. Later ones win.
        path_keys: dotted keys whose values are paths.
        base_dir: what relative paths among the overrides are taken from: a person types them where they are, not where
            the job file is.

    Raises:
        ConfigError: an override is not ``key=value``, its value is not YAML, or its key leads through a value that
            holds no keys.
    """
    result = dict(values)
    paths = frozenset(path_keys)
    for override in overrides:
        key, equals, text = override.partition("=")
        parts = key.strip().split(".")
        if not equals or not all(parts):
            raise ConfigError(f"{override!r} is not a setting; write key=value, for example training.steps=50")
        try:
            value = read_yaml(text)
        except yaml.YAMLError as error:
            raise ConfigError(f"the value of {override!r} is not YAML: {error}") from error
        if ".".join(parts) in paths and isinstance(value, str):
            value = str((base_dir / Path(value).expanduser()).resolve())
        _place(result, parts, value, override)
    return result


def _place(values: dict[str, Any], parts: list[str], value: Any, override: str) -> None:
    for depth, part in enumerate(parts[:-1], start=1):
        inner = values.get(part)
        if inner is None:
            inner = {}
        elif isinstance(inner, Mapping):
            inner = dict(inner)
        else:
            raise ConfigError(
                f"{override!r} cannot be set: {'.'.join(parts[:depth])} is {inner!r} there, not a group of keys"
            )
        values[part] = inner
        values = inner
    values[parts[-1]] = value
