"""Whether a run is good enough: joint shares under absolute or relative limits, or percentiles.

The first and the last requests of a run do not count: the cluster was still filling, or already
draining.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ..latency.phase_latency import PhaseLatency, decode_features, prompt_features
from ..simulation.run import FloatColumn, StopRule
from ..workload.slo import SloPolicy, SlowdownTargets
from ..workload.workload import Workload

EDGE = 0.05  # of the requests at either end


class RequestTimes(Protocol):
    """What is judged: `SimulatedRun` and `MirrorTimes` both have it. Rows as in the workload."""

    @property
    def ttft_s(self) -> NDArray[np.float64]: ...
    @property
    def tpot_s(self) -> NDArray[np.float64]: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """One run, judged. `attainments` are upper bounds where the run was stopped."""

    passed: bool
    attainments: Mapping[str, float]  # by class
    late: int  # requests over their TTFT limit, or never served
    slow: int  # over their TPOT limit


class Judge(Protocol):
    def stop_rule(self, workload: Workload) -> StopRule | None:
        """When a run cannot pass any more; None: it must be seen whole."""
        ...

    def verdict(self, workload: Workload, times: RequestTimes) -> Verdict: ...

    def share_of(self, name: str) -> float:
        """What the attainment of that name must reach."""
        ...


Unloaded = Callable[[Workload], tuple[FloatColumn, FloatColumn]]  # (TTFT, TPOT) alone, seconds


def unloaded_by(prefill: PhaseLatency, decode: PhaseLatency) -> Unloaded:
    """What each request takes alone on a reference: a whole prompt, then single rows.

    Step times are linear in context, so the mean over an answer is that of its middle step.
    """

    def times(workload: Workload) -> tuple[FloatColumn, FloatColumn]:
        prompts, outputs = workload.prompt_tokens.tolist(), workload.output_tokens.tolist()
        ttft_s = [prefill.total_s(prompt_features(prompt)) for prompt in prompts]
        step_s = [decode.total_s(decode_features(1, prompt)) for prompt in prompts]
        token_s = decode.total_s(decode_features(1, 1)) - decode.total_s(decode_features(1, 0))
        tpot_s = [
            (step + token_s * (output - 2) / 2) if output > 1 else 0.0
            for step, output in zip(step_s, outputs, strict=True)
        ]
        return np.array(ttft_s), np.array(tpot_s)

    return times


def counted_rows(workload: Workload) -> tuple[int, int]:
    edge = int(workload.num_requests * EDGE)
    return edge, workload.num_requests - edge


@dataclass(frozen=True, kw_only=True, slots=True)
class JointJudge:
    """Every class's share of requests that meet TTFT and TPOT. Is a `Judge`."""

    policy: SloPolicy

    def with_share(self, share: float) -> JointJudge:
        """The same targets for another share, of every class."""
        default = replace(self.policy.default, attainment=share)
        classes = {n: replace(t, attainment=share) for n, t in self.policy.classes.items()}
        return replace(self, policy=SloPolicy(default=default, classes=classes))

    def share_of(self, name: str) -> float:
        return self.policy.of(name).attainment

    def stop_rule(self, workload: Workload) -> StopRule:
        first, last = counted_rows(workload)
        ttft_s, tpot_s = self.limits(workload)
        allowed = 0
        for name, rows in _class_rows(workload, first, last).items():
            allowed += int(np.count_nonzero(rows) * (1 - self.policy.of(name).attainment) + 1e-9)
        return StopRule(
            ttft_s=ttft_s, tpot_s=tpot_s, first_row=first, last_row=last, max_misses=allowed
        )

    def verdict(self, workload: Workload, times: RequestTimes) -> Verdict:
        first, last = counted_rows(workload)
        ttft_limit_s, tpot_limit_s = self.limits(workload)
        late = ~(times.ttft_s <= ttft_limit_s)
        slow = ~(times.tpot_s <= tpot_limit_s)
        missed = late | slow
        attainments = {
            name: 1 - float(np.mean(missed[rows]))
            for name, rows in _class_rows(workload, first, last).items()
        }
        return Verdict(
            passed=all(
                share >= self.policy.of(name).attainment - 1e-12
                for name, share in attainments.items()
            ),
            attainments=attainments,
            late=int(np.count_nonzero(late[first:last])),
            slow=int(np.count_nonzero((slow & ~np.isnan(times.tpot_s))[first:last])),
        )

    def limits(self, workload: Workload) -> tuple[FloatColumn, FloatColumn]:
        """Per request, in seconds."""
        names = workload.class_names
        ttft = np.array([self.policy.of(name).ttft_s for name in names])
        tpot = np.array([self.policy.of(name).tpot_s for name in names])
        ids = workload.class_ids
        if ids is None:
            ids = np.zeros(workload.num_requests, dtype=np.int16)
        return ttft[ids], tpot[ids]


@dataclass(frozen=True, kw_only=True, slots=True)
class PercentileJudge:
    """Splitwise's: limits on percentiles of slowdowns, all at once. Is a `Judge`.

    "ttft p90 within 3" holds when nine tenths of the requests take at most three times what they
    take alone; a request of one token has no TPOT and counts in no such share.
    """

    unloaded: Unloaded
    targets: SlowdownTargets
    _alone: dict[int, tuple[Workload, Mapping[str, FloatColumn]]] = field(
        default_factory=dict, repr=False, compare=False
    )

    def stop_rule(self, workload: Workload) -> None:
        """Percentiles are known at the end only."""

    def share_of(self, name: str) -> float:
        """What `shares` must reach: of "ttft p90", 0.9."""
        return float(name.rpartition(" p")[2]) / 100

    def shares(
        self,
        workload: Workload,
        ttft_s: FloatColumn | None,
        tpot_s: FloatColumn | None,
        rows: NDArray[np.int64],
    ) -> dict[str, float]:
        """By limit, the share of the rows that keep it; end to end where both times are given."""
        found = {}
        for metric, slowdown in self._slowdowns(workload, ttft_s, tpot_s, rows).items():
            for rank, limit in getattr(self.targets, metric).items():
                found[f"{metric} p{rank:g}"] = float(np.mean(slowdown <= limit))
        return found

    def broken(
        self, workload: Workload, ttft_s: FloatColumn | None, tpot_s: FloatColumn | None
    ) -> tuple[str, float, float]:
        """Of the limits the one that is kept least: its name, the slowdown there, the limit."""
        rows = np.arange(workload.num_requests)
        found = [
            (f"{metric} p{rank:g}", float(np.percentile(slowdown, rank)), limit)
            for metric, slowdown in self._slowdowns(workload, ttft_s, tpot_s, rows).items()
            for rank, limit in getattr(self.targets, metric).items()
        ]
        return max(found, key=lambda entry: entry[1] / entry[2])

    def joint_share(
        self, workload: Workload, ttft_s: FloatColumn, tpot_s: FloatColumn, rows: NDArray[np.int64]
    ) -> float:
        """Of the rows, those within the limits of the highest rank up to 90%, all at once."""
        ok = np.ones(len(rows), dtype=bool)
        for metric, slowdown in self._slowdowns(workload, ttft_s, tpot_s, rows).items():
            limits = getattr(self.targets, metric)
            if limits and len(slowdown) == len(rows):
                ok &= slowdown <= limits[middle_rank(limits)]
        return float(ok.mean())

    def verdict(self, workload: Workload, times: RequestTimes) -> Verdict:
        first, last = counted_rows(workload)
        rows = np.arange(first, last)
        shares = self.shares(workload, times.ttft_s, times.tpot_s, rows)
        missed = [name for name, share in shares.items() if share < self.share_of(name) - 1e-12]
        return Verdict(
            passed=not missed,
            attainments=shares,
            late=sum(name.startswith("ttft") for name in missed),
            slow=sum(name.startswith("tpot") for name in missed),
        )

    def _slowdowns(
        self,
        workload: Workload,
        ttft_s: FloatColumn | None,
        tpot_s: FloatColumn | None,
        rows: NDArray[np.int64],
    ) -> dict[str, FloatColumn]:
        alone = self._of_alone(workload)
        loaded = {"ttft": ttft_s, "tpot": tpot_s}
        if ttft_s is not None and tpot_s is not None:
            loaded["e2e"] = ttft_s + tpot_s * np.maximum(workload.output_tokens - 1, 0)
        found = {}
        for metric, seconds in loaded.items():
            if seconds is None:
                continue
            own = rows[alone[metric][rows] > 0]
            if len(own):
                never = np.isnan(seconds[own])
                found[metric] = np.where(never, np.inf, seconds[own]) / alone[metric][own]
        return found

    def _of_alone(self, workload: Workload) -> Mapping[str, FloatColumn]:
        """Of the same requests at any rate."""
        key = id(workload.prompt_tokens)
        if key not in self._alone:
            ttft_s, tpot_s = self.unloaded(workload)
            e2e_s = ttft_s + tpot_s * np.maximum(workload.output_tokens - 1, 0)
            self._alone[key] = workload, {"ttft": ttft_s, "tpot": tpot_s, "e2e": e2e_s}
        return self._alone[key][1]


def middle_rank(limits: Mapping[float, float]) -> float:
    """The highest rank up to 90%, else the lowest: what one target stands for where there can be
    but one."""
    return max((rank for rank in limits if rank <= 90), default=min(limits))


def spared(share: float, target: float) -> float:
    """How far a share is above its target, as a part of what the target lets miss."""
    return (share - target) / max(1e-9, 1 - target)


def _class_rows(workload: Workload, first: int, last: int) -> dict[str, NDArray[np.bool_]]:
    """Counted rows of every class that has some."""
    counted = np.zeros(workload.num_requests, dtype=bool)
    counted[first:last] = True
    if workload.class_ids is None:
        return {workload.class_names[0]: counted}
    found = {
        name: counted & (workload.class_ids == i) for i, name in enumerate(workload.class_names)
    }
    return {name: rows for name, rows in found.items() if rows.any()}
