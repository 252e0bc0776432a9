"""The highest rate whose margin is not negative, by a bracket that grows and is then halved."""

from __future__ import annotations

from collections.abc import Callable

TOLERANCE = 0.03
NEAR = 1.1  # first step from a rate that is nearly known


def highest_rate(margin: Callable[[float], float], guess_rps: float) -> float:
    """The highest rate whose margin is not negative; 0 where a fiftieth of the guess has none."""
    low, high = 0.0, guess_rps
    while margin(high) >= 0:
        low, high = high, high * 1.5
        if high > guess_rps * 100:
            return low
    if not low:
        low = high / 2
        while margin(low) < 0:
            low, high = low / 2, low
            if low < guess_rps / 50:
                return 0.0
    return _between(margin, low, high)


def highest_rate_near(margin: Callable[[float], float], near_rps: float) -> float:
    """`highest_rate` where it is nearly known: the bracket is narrow at first, and grows."""
    low = high = near_rps
    factor = NEAR
    if margin(near_rps) >= 0:
        while margin(high := high * factor) >= 0:
            low, factor = high, factor * factor
            if high > near_rps * 100:
                return low
    else:
        while margin(low := low / factor) < 0:
            high, factor = low, factor * factor
            if low < near_rps / 50:
                return 0.0
    return _between(margin, low, high)


def rate_and_bound(
    tried: Callable[[float], tuple[float, str]], guess_rps: float, *, near: bool
) -> tuple[float, str]:
    """The highest rate, and what binds at the least that was tried above it. `tried` yields a
    rate's margin and what it misses more; `near`: the guess is nearly it."""
    missed: dict[float, str] = {}

    def margin(rate_rps: float) -> float:
        found, missed[rate_rps] = tried(rate_rps)
        return found

    rate_rps = (highest_rate_near if near else highest_rate)(margin, guess_rps)
    above = [rate for rate in missed if rate > rate_rps]
    return rate_rps, missed[min(above)] if above else "tpot"


def _between(margin: Callable[[float], float], low: float, high: float) -> float:
    while high - low > TOLERANCE * high:
        middle = (low + high) / 2
        low, high = (middle, high) if margin(middle) >= 0 else (low, middle)
    return low
