"""Targets for the first token and for each later one, and the share of requests that meet them.

A request counts when it meets TTFT *and* TPOT: two shares of 90% tested apart leave a joint
share of 83 to 92%. Absolute targets are seconds; slowdowns are multiples of what the same
request takes on an unloaded reference (Splitwise, ISCA '24, table VI).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import nan
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...engine.errors import InvalidConfig
from .section import known_keys, nearest, positive

Column = NDArray[np.float64]
DEFAULT_ATTAINMENT = 0.9
MILLISECONDS = "give milliseconds in digits, as 250 or 0.5"


@dataclass(frozen=True, kw_only=True, slots=True)
class SloTargets:
    """What one request shall meet, and the share of requests that shall."""

    ttft_s: float
    tpot_s: float
    attainment: float = DEFAULT_ATTAINMENT


@dataclass(frozen=True, kw_only=True, slots=True)
class SlowdownTargets:
    """Limits on percentiles of (time / unloaded time): `ttft[90] = 3` binds the 90th."""

    ttft: Mapping[float, float]
    tpot: Mapping[float, float]
    e2e: Mapping[float, float]

    def scaled(self, ttft: float, tpot: float) -> SlowdownTargets:
        """Tighter or looser; end to end goes with TPOT, of which it mostly is."""
        return SlowdownTargets(
            ttft={rank: limit * ttft for rank, limit in self.ttft.items()},
            tpot={rank: limit * tpot for rank, limit in self.tpot.items()},
            e2e={rank: limit * tpot for rank, limit in self.e2e.items()},
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class SloPolicy:
    """The targets of every class; a class that is not named has the default's."""

    default: SloTargets
    classes: Mapping[str, SloTargets]

    def of(self, name: str) -> SloTargets:
        return self.classes.get(name, self.default)


def met(ttft_s: Column, tpot_s: Column, targets: SloTargets) -> NDArray[np.bool_]:
    """Which requests meet both targets. NaN (never served) does not; one token has TPOT 0."""
    return (ttft_s <= targets.ttft_s) & (tpot_s <= targets.tpot_s)


def joint_attainment(ttft_s: Column, tpot_s: Column, targets: SloTargets) -> float:
    """The share of requests that meet TTFT and TPOT."""
    return float(np.mean(met(ttft_s, tpot_s, targets)))


def class_attainments(
    ttft_s: Column,
    tpot_s: Column,
    policy: SloPolicy,
    class_ids: NDArray[np.int16] | None,
    class_names: tuple[str, ...],
) -> Mapping[str, float]:
    """Joint attainment of each class that has requests."""
    if class_ids is None:
        return {class_names[0]: joint_attainment(ttft_s, tpot_s, policy.of(class_names[0]))}
    return {
        name: joint_attainment(ttft_s[rows], tpot_s[rows], policy.of(name))
        for i, name in enumerate(class_names)
        if (rows := class_ids == i).any()
    }


def meets_policy(attainments: Mapping[str, float], policy: SloPolicy) -> bool:
    """Whether every class reaches its own share."""
    return all(share >= policy.of(name).attainment for name, share in attainments.items())


def percentiles(column: Column, ranks: tuple[float, ...] = (50, 90, 95, 99)) -> tuple[float, ...]:
    """Interpolated percentiles, ranks in percent."""
    return tuple(float(value) for value in np.percentile(column, ranks))


def parse_slo(section: Mapping[str, Any], *, where: str = "slo") -> SloPolicy:
    """`{ttft_ms, tpot_ms, attainment, classes: {name: {ttft_ms, …}}}` of a plan or cluster file.

    A class takes from the default what it does not say. Raises InvalidConfig with the key path.
    """
    known_keys(where, section, ("ttft_ms", "tpot_ms", "attainment", "classes"))
    default = _targets(where, section, None)
    classes = section.get("classes") or {}
    if not isinstance(classes, Mapping):
        raise InvalidConfig(f"{where}.classes", f"{classes!r}", "give {name: {ttft_ms: …}}")
    parsed = {}
    for name, own in classes.items():
        path = f"{where}.classes.{name}"
        if not isinstance(own, Mapping):
            raise InvalidConfig(path, f"{own!r} holds no targets", "give {ttft_ms: …}")
        known_keys(path, own, ("ttft_ms", "tpot_ms", "attainment"))
        parsed[str(name)] = _targets(path, own, default)
    return SloPolicy(default=default, classes=parsed)


def check_classes(policy: SloPolicy, names: Sequence[str], *, where: str = "slo") -> None:
    """Refuse targets of a class that no request can have: nobody would be held to them."""
    for name in policy.classes:
        if name not in names:
            raise InvalidConfig(
                f"{where}.classes.{name}",
                f"no request has this class; the workload has {', '.join(names)}",
                f"nearest is {nearest(name, names)!r}, or give shares in workload.classes",
            )


def _targets(where: str, section: Mapping[str, Any], default: SloTargets | None) -> SloTargets:
    attainment = section.get("attainment", default.attainment if default else DEFAULT_ATTAINMENT)
    if isinstance(attainment, bool) or not isinstance(attainment, int | float):
        attainment = nan
    if not 0 < attainment <= 1:
        raise InvalidConfig(
            f"{where}.attainment",
            f"{section['attainment']!r} is not a share",
            "give one above 0 and at most 1, as 0.9 for 90%",
        )
    ttft_s = _milliseconds(where, section, "ttft_ms", default.ttft_s * 1e3 if default else None)
    tpot_s = _milliseconds(where, section, "tpot_ms", default.tpot_s * 1e3 if default else None)
    return SloTargets(ttft_s=ttft_s / 1e3, tpot_s=tpot_s / 1e3, attainment=float(attainment))


def _milliseconds(where: str, section: Mapping[str, Any], key: str, default: float | None) -> float:
    value = section.get(key, default)
    if value is None:
        raise InvalidConfig(f"{where}.{key}", "is missing", MILLISECONDS)
    return positive(f"{where}.{key}", value, MILLISECONDS)
