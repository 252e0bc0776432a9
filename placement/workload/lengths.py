"""How many tokens prompts and outputs have: fixed, lognormal, or fitted to a trace."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import exp
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...engine.errors import InvalidConfig
from .section import positive, whole

DIGITS = "write it in digits, as 0.8"
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
        return Fixed(tokens=whole(where, value, "tokens"))
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
    maximum = whole(f"{where}.max", value.get("max", 2**31 - 1), "tokens")
    sigma = positive(f"{where}.sigma", value["sigma"], DIGITS)
    if "mean" in value:
        return lognormal_from_mean(positive(f"{where}.mean", value["mean"], DIGITS), sigma, maximum)
    median = positive(f"{where}.median", value["median"], DIGITS)
    return Lognormal(median=median, sigma=sigma, max_tokens=maximum)
