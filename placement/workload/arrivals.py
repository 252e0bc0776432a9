"""When requests arrive. Each function returns sorted seconds from 0; a rate is requests a second.

Arrivals of one seed at two rates are one pattern stretched, so that attainment over rates is
compared on the same noise.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ...engine.errors import InvalidConfig

FloatColumn = NDArray[np.float64]
PROCESSES = ("poisson", "gamma", "uniform", "trace")


def poisson(num_requests: int, rate_rps: float, rng: np.random.Generator) -> FloatColumn:
    """Independent arrivals: exponential gaps."""
    return np.cumsum(rng.exponential(1.0, num_requests)) / rate_rps


def gamma(num_requests: int, rate_rps: float, cv: float, rng: np.random.Generator) -> FloatColumn:
    """Gamma gaps with coefficient of variation `cv`: 1 is Poisson, above 1 comes in bursts."""
    shape = 1.0 / (cv * cv)
    return np.cumsum(rng.gamma(shape, 1.0 / shape, num_requests)) / rate_rps


def uniform(num_requests: int, rate_rps: float) -> FloatColumn:
    """One request every 1/rate seconds."""
    return np.arange(num_requests) / rate_rps


def replay(recorded_s: FloatColumn, rate_rps: float | None) -> FloatColumn:
    """The recorded arrivals, stretched so that the mean rate is `rate_rps` (None: as they were)."""
    shifted = recorded_s - recorded_s[0]
    return shifted if rate_rps is None else shifted * (mean_rate_rps(recorded_s) / rate_rps)


def mean_rate_rps(arrival_s: FloatColumn) -> float:
    """Arrivals a second between the first and the last."""
    span_s = float(arrival_s[-1] - arrival_s[0])
    if len(arrival_s) < 2:
        raise InvalidConfig("workload", "one request alone has no rate", "ask for 2 or more")
    if span_s <= 0:
        raise InvalidConfig(
            "workload.arrivals",
            f"{len(arrival_s)} arrivals at one instant have no rate",
            "use arrivals: poisson with rate_rps, or a trace that spans time",
        )
    return (len(arrival_s) - 1) / span_s
