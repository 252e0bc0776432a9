"""How many tokens prompts and outputs have: fixed, lognormal, or fitted to a trace."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import exp
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...engine.errors import InvalidConfig

IntColumn = NDArray[np.int32]


@dataclass(frozen=True, kw_only=True, slots=True)
class Fixed:
    """Every request alike."""

    tokens: int

    def sample(self, num_requests: int, rng: np.random.Generator) -> IntColumn:
        return np.full(num_requests, self.tokens, dtype=np.int32)


@dataclass(frozen=True, kw_only=True, slots=True)
class Lognormal:
    """Lengths whose logarithm is normal: median `median`, standard deviation `sigma`.

    Rounded to whole tokens and kept within [1, max_tokens].
    """

    median: float
    sigma: float
    max_tokens: int = 2**31 - 1

    def sample(self, num_requests: int, rng: np.random.Generator) -> IntColumn:
        drawn = self.median * np.exp(self.sigma * rng.standard_normal(num_requests))
        return np.clip(np.rint(drawn), 1, self.max_tokens).astype(np.int32)


LengthDistribution = Fixed | Lognormal


def lognormal_from_mean(mean: float, sigma: float, max_tokens: int = 2**31 - 1) -> Lognormal:
    """The lognormal of the given mean: its median is mean · exp(−sigma²/2)."""
    return Lognormal(median=mean * exp(-sigma * sigma / 2), sigma=sigma, max_tokens=max_tokens)


def fit_lognormal(tokens: IntColumn) -> Lognormal:
    """Maximum likelihood on the logarithms, never longer than the longest seen."""
    logs = np.log(tokens)
    return Lognormal(
        median=float(np.exp(logs.mean())), sigma=float(logs.std()), max_tokens=int(tokens.max())
    )


def parse_length(where: str, value: Any) -> LengthDistribution:
    """`512`, or `{mean: 4000, sigma: 0.8}`, or `{median: 1020, sigma: 1.1, max: 8192}`."""
    if isinstance(value, int) and not isinstance(value, bool):
        return Fixed(tokens=_whole(where, value))
    if not isinstance(value, Mapping):
        raise InvalidConfig(
            where, f"{value!r} is not a length", "give a number or {mean: …, sigma: …}"
        )
    unknown = value.keys() - {"mean", "median", "sigma", "max"}
    if unknown or ("mean" in value) == ("median" in value) or "sigma" not in value:
        raise InvalidConfig(
            where,
            f"{dict(value)} does not describe a distribution",
            "give sigma, either mean or median, and at most max",
        )
    maximum = _whole(f"{where}.max", value.get("max", 2**31 - 1))
    sigma = _positive(f"{where}.sigma", value["sigma"])
    if "mean" in value:
        return lognormal_from_mean(_positive(f"{where}.mean", value["mean"]), sigma, maximum)
    median = _positive(f"{where}.median", value["median"])
    return Lognormal(median=median, sigma=sigma, max_tokens=maximum)


def _positive(where: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e12:
        raise InvalidConfig(
            where, f"{value!r} is not a positive number", "write it in digits, as 0.8"
        )
    return float(value)


def _whole(where: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 2**31 - 1:
        raise InvalidConfig(where, f"{value!r} is not a whole number of tokens", "give 1 or more")
    return value
