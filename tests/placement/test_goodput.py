"""Goodput of systems whose answer is known, and what the search reuses."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest
from numpy.typing import NDArray
from phasewise.placement.goodput.goodput import Goodput, GoodputSearch, goodput, mean_interval
from phasewise.placement.goodput.judging import (
    JointJudge,
    PercentileJudge,
    counted_rows,
    unloaded_by,
)
from phasewise.placement.recurrences import queueing
from phasewise.placement.simulation.run import StopRule
from phasewise.placement.simulation.simulator import simulate
from phasewise.placement.workload.lengths import Fixed
from phasewise.placement.workload.slo import SloPolicy, SloTargets, SlowdownTargets
from phasewise.placement.workload.workload import Workload, WorkloadSpec

from .simulated_clusters import constant, latency, pair

SPEC = WorkloadSpec(
    rate_rps=1.0, prompt=Fixed(tokens=100), output=Fixed(tokens=20), num_requests=2000
)


@dataclass
class Times:
    ttft_s: NDArray[np.float64]
    tpot_s: NDArray[np.float64]


@dataclass
class Saturating:
    """TTFT of row i is (i mod 100) / 100 / (1 − rate / 10) seconds: known at every rate."""

    tpot_s: float = 0.01
    rates: list[float] = field(default_factory=list)

    def __call__(self, workload: Workload, stop: StopRule | None) -> Times:
        self.rates.append(workload.rate_rps)
        busy = min(0.999999, workload.rate_rps / 10)
        n = workload.num_requests
        return Times(np.arange(n) % 100 / 100 / (1 - busy), np.full(n, self.tpot_s))


def judge(ttft_s: float = 1.5, tpot_s: float = 0.05, share: float = 0.9) -> JointJudge:
    targets = SloTargets(ttft_s=ttft_s, tpot_s=tpot_s, attainment=share)
    return JointJudge(policy=SloPolicy(default=targets, classes={}))


def known_rate(share: float, ttft_s: float = 1.5) -> float:
    """The highest row that may still be late has (share·100 − 1)/100 / (1 − r/10) = ttft."""
    return 10 * (1 - (share * 100 - 1) / 100 / ttft_s)


@pytest.mark.parametrize("start_rps", [0.001, 1.0, 4.0, 500.0])
def test_the_rate_is_found_from_any_start(start_rps: float) -> None:
    found = goodput(Saturating(), SPEC, judge(), start_rps=start_rps)
    assert found.rate_rps == pytest.approx(known_rate(0.9), rel=0.011)
    assert found.binds == "ttft"


def test_higher_shares_have_lower_rates_and_runs_are_shared() -> None:
    simulation = Saturating()
    search = GoodputSearch(simulation, SPEC)
    found = search.find_shares(judge(), (0.9, 0.95, 0.99))
    for share, one in zip((0.9, 0.95, 0.99), found, strict=True):
        assert one.share == share
        assert one.rate_rps == pytest.approx(known_rate(share), rel=0.011)
    assert search.runs == len(simulation.rates) == sum(one.runs for one in found)
    before = search.runs
    again = search.find_shares(judge(), (0.9, 0.95, 0.99))
    assert [one.rate_rps for one in again] == [one.rate_rps for one in found]
    assert search.runs == before, "all of it was seen"


def test_later_seeds_start_at_what_the_first_found() -> None:
    simulation = Saturating()
    goodput(simulation, SPEC, judge(), start_rps=0.001, seeds=(0,))
    first = len(simulation.rates)
    goodput(simulation, SPEC, judge(), start_rps=0.001, seeds=(0, 1, 2, 3))
    assert len(simulation.rates) - first < 2.5 * first


def test_a_target_that_no_rate_meets_has_goodput_zero() -> None:
    found = goodput(Saturating(tpot_s=0.06), SPEC, judge(), seeds=(0, 1))
    assert found.rate_rps == found.high_rps == 0.0
    assert found.binds == "tpot"


def test_a_rate_so_low_that_times_have_no_digits_left_for_a_second_is_not_tried() -> None:
    def simulation(workload: Workload, _: StopRule | None) -> Times:
        first_s = workload.arrival_s + 1.0
        return Times(first_s - workload.arrival_s, np.full(workload.num_requests, 0.01))

    assert goodput(simulation, SPEC, judge(ttft_s=0.5), seeds=(0, 1)).rate_rps == 0.0


def test_a_request_counts_only_when_it_meets_both() -> None:
    """Even rows miss TPOT, odd rows above the limit miss TTFT."""

    def simulation(workload: Workload, _: StopRule | None) -> Times:
        rows = np.arange(workload.num_requests)
        return Times(np.where(rows % 10 == 1, 9.0, 0.1), np.where(rows % 10 == 2, 9.0, 0.01))

    workload = SPEC.build(0)
    verdict = judge(share=0.85).verdict(workload, simulation(workload, None))
    assert verdict.attainments["default"] == pytest.approx(0.8)
    assert not verdict.passed


def test_each_class_has_its_own_targets_and_share() -> None:
    spec = WorkloadSpec(
        rate_rps=1.0,
        prompt=Fixed(tokens=100),
        output=Fixed(tokens=20),
        class_shares={"chat": 0.5, "batch": 0.5},
    )
    chat = SloTargets(ttft_s=0.5, tpot_s=0.05, attainment=0.9)
    batch = SloTargets(ttft_s=50.0, tpot_s=0.05, attainment=0.5)
    policy = SloPolicy(default=chat, classes={"batch": batch})
    both = goodput(Saturating(), spec, JointJudge(policy=policy), seeds=(0, 1))
    lenient = SloPolicy(default=batch, classes={})
    easy = goodput(Saturating(), spec, JointJudge(policy=lenient), seeds=(0, 1))
    assert both.rate_rps < easy.rate_rps
    workload = spec.build(0)
    verdict = JointJudge(policy=policy).verdict(workload, Saturating()(workload, None))
    assert set(verdict.attainments) == {"chat", "batch"}


def test_percentiles_of_slowdowns_are_judged_all_at_once() -> None:
    """Alone: TTFT 1 s, 19 tokens of 10 ms. The 90th of e2e binds: ≤ 1.5 · 1.19 s."""
    unloaded = unloaded_by(latency(constant(1.0)), latency(constant(0.01)))
    tokens = {50: 1.25, 90: 1.5, 99: 5.0}
    targets = SlowdownTargets(ttft={50: 2.0, 90: 3.0, 99: 6.0}, tpot=tokens, e2e=tokens)
    judge = PercentileJudge(unloaded=unloaded, targets=targets)
    found = goodput(Saturating(), SPEC, judge, seeds=(0,))
    known_rps = 10 * (1 - 0.9 / (1.5 * 1.19 - 0.19))
    assert found.rate_rps == pytest.approx(known_rps, rel=0.02)
    assert np.isnan(found.share)


def test_the_ends_of_a_run_do_not_count() -> None:
    workload = SPEC.build(0)
    first, last = counted_rows(workload)
    times = Saturating()(workload.at_rate(0.1), None)
    times.ttft_s[:first] = times.ttft_s[last:] = np.nan
    assert judge().verdict(workload, times).attainments["default"] == 1.0
    times.ttft_s[first] = np.nan
    assert judge().verdict(workload, times).attainments["default"] < 1.0


def test_a_stop_rule_allows_as_many_misses_as_the_share_does() -> None:
    rule = judge(share=0.9).stop_rule(SPEC.build(0))
    assert rule.last_row - rule.first_row == 1800
    assert rule.max_misses == 180


def test_stopping_early_does_not_change_the_answer() -> None:
    deployment = pair()
    spec = WorkloadSpec(
        rate_rps=1.0, prompt=Fixed(tokens=200), output=Fixed(tokens=30), num_requests=600
    )
    target = judge(ttft_s=0.08, tpot_s=0.02)
    hasty, whole = (
        goodput(
            lambda workload, stop, early=early: simulate(
                deployment, workload, stop=stop if early else None
            ),
            spec,
            target,
            seeds=(0, 1),
            start_rps=20.0,
            tolerance=0.02,
        )
        for early in (True, False)
    )
    assert hasty.per_seed == whole.per_seed
    assert hasty.rate_rps > 0


def test_simulated_goodput_agrees_with_md1_where_that_is_exact() -> None:
    """Half of all requests within the median: the mean wait of M/D/1 is near it at this load."""
    deployment = pair(prefill_time=constant(0.1), max_batch_size=1, kv_bytes_per_token=0.0)
    spec = WorkloadSpec(
        rate_rps=1.0, prompt=Fixed(tokens=10), output=Fixed(tokens=1), num_requests=3000
    )
    limit_s = 0.4  # TTFT at most; P(wait ≤ 0.3) of M/D/1 by Erlang's formula
    found = goodput(
        lambda workload, stop: simulate(deployment, workload, stop=stop),
        spec,
        judge(ttft_s=limit_s, tpot_s=1.0),
        start_rps=queueing.max_rate_rps(0.1, limit_s),
    )
    exact = next(r for r in np.arange(9.9, 1.0, -0.01) if waits_within(0.3, 0.1, r) >= 0.9)
    assert found.low_rps * 0.97 <= exact <= found.high_rps * 1.03


def waits_within(wait_s: float, service_s: float, rate_rps: float) -> float:
    """P(W ≤ t) of M/D/1 (Erlang 1909): (1 − ρ) Σ_{k ≤ t/D} (−λ(t − kD))^k / k! · e^{λ(t − kD)}."""
    total, factorial = 0.0, 1.0
    for k in range(int(wait_s / service_s + 1e-9) + 1):
        factorial *= max(k, 1)
        x = rate_rps * (wait_s - k * service_s)
        total += (-x) ** k / factorial * np.exp(x)
    return float((1 - rate_rps * service_s) * total)


def test_the_interval_is_students() -> None:
    mean, half = mean_interval([1.0, 2.0, 3.0])
    assert mean == 2.0
    assert half == pytest.approx(4.302653 / np.sqrt(3), rel=1e-6)
    assert mean_interval([5.0]) == (5.0, 0.0)


def test_goodput_says_how_many_runs_it_took() -> None:
    found = goodput(Saturating(), SPEC, judge(), seeds=(0,))
    assert isinstance(found, Goodput) and found.runs > 3
