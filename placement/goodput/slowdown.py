"""Targets as multiples of what a request takes alone on a reference machine.

```yaml
slo:
  slowdown:
    reference: a100            # a machine of the inventory; nodes: 0 where it is that only
    tensor_parallel: 8
    ttft: {p50: 2, p90: 3, p99: 6}
    tpot: {p50: 1.25, p90: 1.5, p99: 5}
    e2e: {p50: 1.25, p90: 1.5, p99: 5}
```
All limits hold at once (Splitwise, ISCA '24, table VI, is the example). Schedulers and the cluster
file know seconds: a limit times that percentile of what requests take alone. For TTFT it is the one
of the highest rank up to 90. For TPOT it is the one of the highest rank of all: a step with a chunk
must keep within it, while lower ranks are kept by how many such steps there are.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...engine.errors import InvalidConfig
from ..workload.section import known_keys, positive, whole
from ..workload.slo import SloPolicy, SloTargets, SlowdownTargets
from ..workload.workload import WorkloadSpec
from .judging import PercentileJudge, middle_rank

RANK = re.compile(r"p(\d{1,2}(?:\.\d+)?)")
METRICS = ("ttft", "tpot", "e2e")
KEYS = ("reference", "tensor_parallel", "pipeline_parallel", *METRICS)


@dataclass(frozen=True, kw_only=True, slots=True)
class SlowdownSection:
    """`slo.slowdown`, checked. The reference is a worker of that shape."""

    reference: str
    tensor_parallel: int
    pipeline_parallel: int
    targets: SlowdownTargets


def parse_slowdown(slo: Mapping[str, Any], *, where: str = "slo") -> SlowdownSection:
    """Of a plan's slo section that has `slowdown`. Raises InvalidConfig with the key path."""
    beside = [key for key in slo if key != "slowdown"]
    if beside:
        raise InvalidConfig(
            f"{where}.{beside[0]}", "stands beside slowdown", "give one kind of targets"
        )
    section, where = slo["slowdown"], f"{where}.slowdown"
    if not isinstance(section, Mapping):
        raise InvalidConfig(where, f"{section!r} holds no limits", "give {reference: …, ttft: …}")
    known_keys(where, section, KEYS)
    if "reference" not in section:
        raise InvalidConfig(f"{where}.reference", "is missing", "name a machine of the inventory")
    limits = {metric: _limits(f"{where}.{metric}", section.get(metric)) for metric in METRICS}
    for metric in ("ttft", "tpot"):
        if not limits[metric]:
            raise InvalidConfig(f"{where}.{metric}", "has no limit", "give one, as {p90: 3}")
    return SlowdownSection(
        reference=str(section["reference"]),
        **{
            key: whole(f"{where}.{key}", section.get(key, 1), "GPUs", most=1024)
            for key in ("tensor_parallel", "pipeline_parallel")
        },
        targets=SlowdownTargets(**limits),
    )


def _limits(where: str, section: Any) -> dict[float, float]:
    if section is None:
        return {}
    if not isinstance(section, Mapping):
        raise InvalidConfig(where, f"{section!r} holds no limits", "give {p90: 3}")
    limits: dict[float, float] = {}
    for key, value in section.items():
        match = RANK.fullmatch(str(key))
        if match is None or not 0 < float(match[1]) < 100:
            raise InvalidConfig(f"{where}.{key}", "is no percentile", "write p50, p90 or p99.5")
        multiple = positive(f"{where}.{key}", value, "give a multiple, as 1.5", below=1e6)
        limits[float(match[1])] = multiple
    ordered = [limits[rank] for rank in sorted(limits)]
    if ordered != sorted(ordered):
        raise InvalidConfig(where, "a higher percentile has a lower limit", "order them")
    return limits


def policy_of(judge: PercentileJudge, spec: WorkloadSpec) -> SloPolicy:
    """In seconds, what schedulers and the cluster file are told."""
    workload = spec.build(0, rate_rps=1.0)
    ttft_s, tpot_s = judge.unloaded(workload)
    several = tpot_s[workload.output_tokens > 1]
    if not len(several):
        raise InvalidConfig(
            "slo.slowdown.tpot", "every answer is one token long", "give a workload with more"
        )
    ranks = middle_rank(judge.targets.ttft), max(judge.targets.tpot)
    targets = SloTargets(
        ttft_s=judge.targets.ttft[ranks[0]] * float(np.percentile(ttft_s, ranks[0])),
        tpot_s=judge.targets.tpot[ranks[1]] * float(np.percentile(several, ranks[1])),
        attainment=min(ranks) / 100,
    )
    return SloPolicy(default=targets, classes={})
