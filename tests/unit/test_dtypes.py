from __future__ import annotations

import pytest

from plutino.dtypes import MOST_SLOWER, offered_dtypes, slow_dtypes


@pytest.mark.parametrize(
    ("bf16_s", "offered", "slow"),
    [
        (0.5, ("bf16", "fp32"), {}),
        (2.0, ("fp32", "bf16"), {}),
        (MOST_SLOWER, ("fp32", "bf16"), {}),
        (300.0, ("fp32",), {"bf16": 300.0}),
    ],
)
def test_dtype_is_kept_back_only_where_it_is_absurdly_slow(
    bf16_s: float, offered: tuple[str, ...], slow: dict[str, float]
) -> None:
    seconds = {"fp32": 1.0, "bf16": bf16_s}

    assert (offered_dtypes(seconds), slow_dtypes(seconds)) == (offered, slow)
