"""YAML that people write, read as they mean it: ``off`` is a word, and a key stands once.

YAML 1.1 takes unquoted ``on``, ``off``, ``yes`` and ``no`` for booleans, so that a setting with the choices ``on`` and
``off`` would get neither. As in YAML 1.2 only ``true`` and ``false`` are booleans here; boolean settings take the other
words too, because pydantic reads them so.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

_BOOLEAN_TAG = "tag:yaml.org,2002:bool"


def read_yaml(text: str) -> Any:
    """The value of a YAML or JSON text.

    Raises:
        yaml.YAMLError: it is none, asks for more than plain values, or a mapping has a key twice.
    """
    return yaml.load(text, _Loader)


class _Loader(yaml.SafeLoader):
    """Refuses a key that is written twice; YAML's own loader silently takes the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key.value!r} is written twice; keep one", key.start_mark
                )
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != _BOOLEAN_TAG]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(_BOOLEAN_TAG, re.compile("^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF"))
