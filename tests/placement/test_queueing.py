"""Closed forms against a simulated queue."""

from __future__ import annotations

from math import inf

import numpy as np
import pytest
from phasewise.placement.recurrences import queueing
from phasewise.placement.workload.arrivals import poisson


def simulated_mean_s(service_s: list[float], rate_rps: float, seed: int) -> float:
    """Mean time through stations in a row, each first come, first served."""
    arrival_s = poisson(200_000, rate_rps, np.random.default_rng(seed))
    ready = arrival_s
    for each_s in service_s:
        steps = np.arange(len(ready)) * each_s
        ready = np.maximum.accumulate(ready - steps) + steps + each_s
    return float(np.mean(ready - arrival_s))


@pytest.mark.parametrize("load", [0.3, 0.6, 0.8])
def test_one_device_two_stages_and_tensor_parallel_match_a_simulated_queue(load: float) -> None:
    d, r = 0.2, load / 0.2
    for exact, stations in (
        (queueing.mean_ttft_s(d, r), [d]),
        (queueing.mean_ttft_pipeline_s(d, r, stages=2), [d / 2, d / 2]),
        (queueing.mean_ttft_tensor_s(d, r, speedup=1.6), [d / 1.6]),
    ):
        assert simulated_mean_s(stations, r, seed=3) == pytest.approx(exact, rel=0.03)


def test_the_formulas_are_those_of_the_paper() -> None:
    d, r, k = 0.3, 2.0, 1.7
    assert queueing.mean_ttft_s(d, r) == pytest.approx(d + r * d * d / (2 * (1 - r * d)))
    two = d + r * d * d / (4 * (2 - r * d))
    assert queueing.mean_ttft_pipeline_s(d, r) == pytest.approx(two)
    tensor = d / k + r * d * d / (2 * k * (k - r * d))
    assert queueing.mean_ttft_tensor_s(d, r, speedup=k) == pytest.approx(tensor)


def test_an_overloaded_device_never_answers_in_time() -> None:
    assert queueing.mean_ttft_s(0.5, 2.0) == inf
    assert queueing.max_rate_rps(0.5, 0.4) == 0


def test_the_highest_rate_reaches_the_limit_exactly() -> None:
    rate = queueing.max_rate_rps(0.1, 0.25)
    assert queueing.mean_ttft_s(0.1, rate) == pytest.approx(0.25)
