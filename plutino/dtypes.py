"""Which compute dtypes a device offers to jobs, from the seconds of one product in each: pure.

A dtype that is slower than fp32 is offered all the same, behind it: where memory is short it may be what makes a job
fit, and a plan prices what the device measures in it. Only what is absurdly slow is kept back: on CPUs without bf16
units a product of the backward pass falls to a loop that takes up to 300 times fp32's time.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

MOST_SLOWER = 4.0
"""A dtype may take so many times the seconds of fp32."""


def offered_dtypes(seconds: Mapping[str, float]) -> tuple[str, ...]:
    """Dtypes to offer, fastest first; fp32 is always among them.

    Args:
        seconds: of the same product in each dtype, fp32 included, measured beside each other.
    """
    return tuple(sorted(seconds.keys() - slow_dtypes(seconds).keys(), key=lambda name: (seconds[name], name)))


def slow_dtypes(seconds: Mapping[str, float]) -> dict[str, float]:
    """Dtypes to keep back, and how many times fp32's seconds each takes."""
    times = {name: took_s / seconds["fp32"] for name, took_s in seconds.items()}
    return {name: factor for name, factor in times.items() if factor > MOST_SLOWER}


def why_not_run(dtype: str, offered: Collection[str], slow: Mapping[str, float]) -> str:
    """Why a device takes no part in a job of a dtype that it does not offer."""
    why = f"does not run {dtype}, only {', '.join(offered)}"
    if dtype not in slow:
        return why
    return f"{why}: its {dtype} takes {slow[dtype]:.3g} times fp32's seconds, and at most {MOST_SLOWER:g} are offered"
