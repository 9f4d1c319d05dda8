from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.weights.rate import TokenBucket
from plutino.errors import ConfigError


def test_token_bucket_lets_the_burst_pass_and_then_the_rate():
    bucket = TokenBucket(100, burst_bytes=50, clock=lambda: 0.0)

    assert [bucket.take(50), bucket.take(10), bucket.take(90)] == [0.0, 0.1, 1.0]


def test_token_bucket_of_rate_0_never_waits():
    assert TokenBucket(0, burst_bytes=1).take(1 << 40) == 0.0


def test_token_bucket_of_a_negative_rate_is_refused():
    with pytest.raises(ConfigError, match="negative"):
        TokenBucket(-1, burst_bytes=1)


@given(st.lists(st.tuples(st.integers(0, 500), st.floats(0, 10)), max_size=50))
def test_token_bucket_never_exceeds_burst_plus_rate_times_time(steps):
    now_s = 0.0
    bucket = TokenBucket(100, burst_bytes=50, clock=lambda: now_s)
    moved_bytes = 0
    for num_bytes, idle_s in steps:
        now_s += bucket.take(num_bytes)
        moved_bytes += num_bytes
        assert moved_bytes <= 50 + 100 * now_s + 1e-6
        now_s += idle_s
