"""What a stream of requests is held to, by recurrence: how far the worst share is from its target.

Joint: a class's share of requests that meet TTFT and TPOT. Slowdowns: for each limit "p50 at most
2 times the unloaded reference" the share of requests that keep it, which must be half of them.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ..goodput.judging import PercentileJudge, middle_rank, spared
from ..workload.slo import SloPolicy
from ..workload.workload import Workload

EDGE = 0.1  # of the requests at either end are not judged: the pools fill, then drain

Column = NDArray[np.float64]


class PhaseJudge(Protocol):
    """Times are columns, one row a request; None: that phase is not judged."""

    ttft_s: Column  # what schedulers take for each request's limit
    tpot_s: Column
    mean_tpot_s: float  # more than this no mean step takes

    def margin(self, ttft_s: Column | None, tpot_s: Column | None) -> float:
        """The least distance of a share to its target, as a part of what the target lets miss;
        not negative where all are reached."""
        ...

    def share(self, ttft_s: Column, tpot_s: Column) -> float:
        """Of requests that meet both, over all classes."""
        ...

    def binds(self, ttft_s: Column, tpot_s: Column) -> str:
        """Which of the two is missed more: "ttft" | "tpot"."""
        ...


class JointRows:
    """TTFT and TPOT within seconds, jointly, by class. Is a `PhaseJudge`."""

    def __init__(self, workload: Workload, slo: SloPolicy) -> None:
        ids = workload.class_ids
        n = workload.num_requests
        ids = np.zeros(n, dtype=np.int16) if ids is None else ids
        targets = [slo.of(name) for name in workload.class_names]
        self.ttft_s = np.array([t.ttft_s for t in targets])[ids]
        self.tpot_s = np.array([t.tpot_s for t in targets])[ids]
        self.mean_tpot_s = float(self.tpot_s.max())
        counted = _counted(n)
        self._rows = [
            (counted & (ids == i), t.attainment)
            for i, t in enumerate(targets)
            if (counted & (ids == i)).any()
        ]
        self._all = counted

    def margin(self, ttft_s: Column | None, tpot_s: Column | None) -> float:
        ok = self._met(ttft_s, tpot_s)
        return min(spared(float(ok[rows].mean()), share) for rows, share in self._rows)

    def share(self, ttft_s: Column, tpot_s: Column) -> float:
        return float(self._met(ttft_s, tpot_s)[self._all].mean())

    def binds(self, ttft_s: Column, tpot_s: Column) -> str:
        in_time, steady = ttft_s <= self.ttft_s, tpot_s <= self.tpot_s
        return "ttft" if in_time.mean() < steady.mean() else "tpot"

    def _met(self, ttft_s: Column | None, tpot_s: Column | None) -> NDArray[np.bool_]:
        ok = np.ones(len(self.ttft_s), dtype=bool)
        if ttft_s is not None:
            ok &= ttft_s <= self.ttft_s
        if tpot_s is not None:
            ok &= tpot_s <= self.tpot_s
        return ok


class SlowdownRows:
    """Limits on percentiles of slowdowns, all at once. Is a `PhaseJudge`."""

    def __init__(self, workload: Workload, slo: SloPolicy, judge: PercentileJudge) -> None:
        self._workload, self._judge = workload, judge
        n = workload.num_requests
        self.ttft_s = np.full(n, slo.default.ttft_s)
        self.tpot_s = np.full(n, slo.default.tpot_s)
        limits = judge.targets.tpot
        several = workload.output_tokens > 1
        alone_s = judge.unloaded(workload)[1][several]
        self.mean_tpot_s = limits[middle_rank(limits)] * float(alone_s.max(initial=1e-9))
        self._rows = np.flatnonzero(_counted(n))

    def margin(self, ttft_s: Column | None, tpot_s: Column | None) -> float:
        shares = self._judge.shares(self._workload, ttft_s, tpot_s, self._rows)
        return min(spared(share, self._judge.share_of(name)) for name, share in shares.items())

    def share(self, ttft_s: Column, tpot_s: Column) -> float:
        return self._judge.joint_share(self._workload, ttft_s, tpot_s, self._rows)

    def binds(self, ttft_s: Column, tpot_s: Column) -> str:
        return "ttft" if self.margin(ttft_s, None) < self.margin(None, tpot_s) else "tpot"


def _counted(num_requests: int) -> NDArray[np.bool_]:
    edge = int(num_requests * EDGE)
    counted = np.zeros(num_requests, dtype=bool)
    counted[edge : num_requests - edge] = True
    return counted
