from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from plutino.errors import ConfigError
from plutino.sizes import format_size, parse_size


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [("600MiB", 600 << 20), ("1.5 GiB", 3 << 29), ("2gb", 2 * 10**9), ("12B", 12), (" 1KiB ", 1024)],
)
def test_parse_size_reads_numbers_with_a_unit(text, size_bytes):
    assert parse_size(text) == size_bytes


@pytest.mark.parametrize(
    "text", ["", "600", "MiB", "-1MiB", "1e3MiB", "nanGiB", "0.1B", "0GiB", "1 XiB", "1MiB2", "٣MiB"]
)
def test_parse_size_refuses_anything_else_and_shows_how(text):
    with pytest.raises(ConfigError, match="600MiB"):
        parse_size(text)


@pytest.mark.parametrize(
    ("size_bytes", "text"),
    [(0, "0 B"), (1023, "1023 B"), (600 << 20, "600 MiB"), (3 << 29, "1.5 GiB"), (-2048, "-2 KiB")],
)
def test_format_size_uses_the_largest_fitting_unit(size_bytes, text):
    assert format_size(size_bytes) == text


@given(st.integers(1, 2**60))
def test_format_size_reads_back_within_its_last_digit(size_bytes):
    assert parse_size(format_size(size_bytes)) == pytest.approx(size_bytes, rel=0.051)
