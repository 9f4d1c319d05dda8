from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from tests.lan.network import Lan, missing


@pytest.fixture(scope="session")
def _no_lan() -> str | None:
    return missing()


@pytest.fixture
def lan(_no_lan: str | None) -> Iterator[Callable[..., Lan]]:
    """Makes a LAN; skips with the reason where there can be none."""
    if _no_lan is not None:
        pytest.skip(f"no LAN for tests: {_no_lan}")
    with ExitStack() as stack:
        yield lambda num_hosts, **options: stack.enter_context(Lan(num_hosts, **options))
