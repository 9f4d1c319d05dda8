"""A user's reward function in a process of its own: ``python -m coordinator.jobs.reward_process FILE.py NAME``.

Reads one JSON object a line (prompt, answer, truth) and writes one a line: the value, or what went wrong. Imports
nothing but the standard library, so that it starts at once.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import traceback
from collections.abc import Callable
from typing import Any


def main() -> None:
    """Answer until standard input ends."""
    # What the user's code prints must not come between the answers.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    path, name = sys.argv[1:3]
    function: Callable[..., Any] | None = None
    for line in sys.stdin:
        try:
            if function is None:
                function = _load(path, name)
            value = function(**json.loads(line))
            # Whatever behaves as a number, of numpy for instance.
            answer: dict[str, Any] = {"value": None if value is None else float(value)}
        except BaseException as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            answer = {"error": f"{type(error).__name__}: {error} ({os.path.basename(where.filename)}:{where.lineno})"}
        # NaN and infinity are no JSON, but Python reads what it writes.
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def _load(path: str, name: str) -> Callable[..., Any]:
    spec = importlib.util.spec_from_file_location("plutino_reward", path)
    if spec is None or spec.loader is None or not os.path.isfile(path):
        raise FileNotFoundError(f"{path} is no Python file that can be read")
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, os.path.dirname(path))
    spec.loader.exec_module(module)
    function = getattr(module, name, None)
    if not callable(function):
        raise AttributeError(f"{path} has no function {name}")
    return function  # type: ignore[no-any-return]


if __name__ == "__main__":
    main()
