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

from .latency import PhaseLatency, decode_features, prompt_features
from .simulated_run import FloatColumn, StopRule
from .slo import SPLITWISE_SLOWDOWNS, SloPolicy, SlowdownTargets, slowdown_misses
from .workload import Workload

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
    """Every class's share of requests that meet TTFT and TPOT. Is a `Judge`.

    With `unloaded`, the policy's targets are multiples of it instead of seconds.
    """

    policy: SloPolicy
    unloaded: Unloaded | None = None
    _limits: dict[int, tuple[FloatColumn, FloatColumn]] = field(
        default_factory=dict, repr=False, compare=False
    )

    def with_share(self, share: float) -> JointJudge:
        """The same targets for another share, of every class."""
        default = replace(self.policy.default, attainment=share)
        classes = {n: replace(t, attainment=share) for n, t in self.policy.classes.items()}
        return replace(self, policy=SloPolicy(default=default, classes=classes))

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
        """Per request, in seconds; the same for a workload at another rate."""
        key = id(workload.prompt_tokens)
        if key in self._limits:
            return self._limits[key]
        names = workload.class_names
        ttft = np.array([self.policy.of(name).ttft_s for name in names])
        tpot = np.array([self.policy.of(name).tpot_s for name in names])
        ids = workload.class_ids
        if ids is None:
            ids = np.zeros(workload.num_requests, dtype=np.int16)
        ttft_s, tpot_s = ttft[ids], tpot[ids]
        if self.unloaded is not None:
            alone = self.unloaded(workload)
            ttft_s, tpot_s = ttft_s * alone[0], tpot_s * alone[1]
        self._limits[key] = (ttft_s, tpot_s)
        return ttft_s, tpot_s


@dataclass(frozen=True, kw_only=True, slots=True)
class PercentileJudge:
    """Splitwise's: limits on percentiles of slowdowns, all at once. Is a `Judge`."""

    unloaded: Unloaded
    targets: SlowdownTargets = SPLITWISE_SLOWDOWNS

    def stop_rule(self, workload: Workload) -> None:
        """Percentiles are known at the end only."""

    def verdict(self, workload: Workload, times: RequestTimes) -> Verdict:
        first, last = counted_rows(workload)
        steps = np.maximum(workload.output_tokens - 1, 0)
        alone = self.unloaded(workload)
        columns = []
        for ttft_s, tpot_s in ((times.ttft_s, times.tpot_s), alone):
            e2e_s = ttft_s + tpot_s * steps
            pairs = {"ttft": ttft_s, "tpot": tpot_s, "e2e": e2e_s}
            columns.append({n: np.nan_to_num(c[first:last], nan=np.inf) for n, c in pairs.items()})
        misses = slowdown_misses(columns[0], columns[1], self.targets)
        return Verdict(
            passed=not misses,
            attainments={},
            late=sum(miss.startswith("ttft") for miss in misses),
            slow=sum(miss.startswith("tpot") for miss in misses),
        )


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
