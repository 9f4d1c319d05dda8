"""Sweeps over many cases: a seeded sample runs always, the rest under the slow mark."""

from __future__ import annotations

import random
from collections.abc import Collection, Sequence
from typing import Any

import pytest


def sampled(cases: Sequence[Any], num: int, *, always: Collection[Any] = (), seed: int = 0) -> list[Any]:
    """All cases as parameters of a test, all but ``num`` of them slow.

    Args:
        cases: tuples of a test's arguments, or single arguments.
        num: how many run always.
        always: cases that are among those, because no other proves what they do.
        seed: of the choice of the others.
    """
    others = [index for index, case in enumerate(cases) if case not in always]
    kept = set(random.Random(seed).sample(others, num - len(always)))
    kept |= set(range(len(cases))) - set(others)
    return [
        pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=() if index in kept else pytest.mark.slow)
        for index, case in enumerate(cases)
    ]
