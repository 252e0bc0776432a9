"""Targets as multiples of an unloaded reference: read, judged all at once, told to schedulers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from phasewise.engine.errors import InvalidConfig
from phasewise.placement.goodput.judging import PercentileJudge
from phasewise.placement.goodput.slowdown import parse_slowdown, policy_of
from phasewise.placement.recurrences.phase_judge import SlowdownRows
from phasewise.placement.workload.lengths import Fixed
from phasewise.placement.workload.slo import SlowdownTargets
from phasewise.placement.workload.workload import Workload, WorkloadSpec

SECTION = {"reference": "a100", "ttft": {"p50": 2, "p90": 3}, "tpot": {"p90": 1.5, "p99": 5}}
SPEC = WorkloadSpec(
    rate_rps=1.0, prompt=Fixed(tokens=100), output=Fixed(tokens=11), num_requests=1000
)
ONES = np.ones(1000)


def alone(workload: Workload) -> tuple[np.ndarray, np.ndarray]:
    """A second to the first token, a tenth to each later one."""
    n = workload.num_requests
    return np.full(n, 1.0), np.where(workload.output_tokens > 1, 0.1, 0.0)


def judge(**limits: dict[float, float]) -> PercentileJudge:
    targets = {"ttft": {50.0: 2.0, 90.0: 3.0}, "tpot": {90.0: 1.5}, "e2e": {}, **limits}
    return PercentileJudge(unloaded=alone, targets=SlowdownTargets(**targets))


def test_each_limit_has_the_share_of_requests_that_keep_it() -> None:
    workload, rows = SPEC.build(0), np.arange(1000)
    ttft_s = np.concatenate([np.full(600, 1.9), np.full(250, 2.5), np.full(150, 9.0)])
    shares = judge().shares(workload, ttft_s, 0.12 * ONES, rows)
    assert shares == {"ttft p50": 0.6, "ttft p90": 0.85, "tpot p90": 1.0}
    assert "e2e p90" in judge(e2e={90.0: 2.0}).shares(workload, ttft_s, 0.12 * ONES, rows)
    lost = np.where(rows < 600, 1.9, np.nan)
    assert judge().shares(workload, lost, 0.12 * ONES, rows)["ttft p90"] == 0.6


def test_one_broken_limit_is_enough_and_is_named() -> None:
    workload = SPEC.build(0)
    rows = SlowdownRows(workload, policy_of(judge(), SPEC), judge())
    fine, slow = 0.12 * ONES, 0.16 * ONES
    assert rows.margin(1.5 * ONES, fine) > 0 > rows.margin(1.5 * ONES, slow)
    assert rows.binds(1.5 * ONES, slow) == "tpot" and rows.binds(4 * ONES, fine) == "ttft"
    assert judge().broken(workload, 4 * ONES, fine) == ("ttft p50", 4.0, 2.0)


def test_who_never_had_a_token_is_slower_than_any_limit() -> None:
    workload, rows = SPEC.build(0), np.arange(1000)
    for never in (np.nan, np.inf):
        shares = judge(tpot={90.0: 1e300}).shares(workload, ONES, np.full(1000, never), rows)
        assert shares["tpot p90"] == 0.0 and shares["ttft p90"] == 1.0


def test_an_answer_of_one_token_has_no_time_between_tokens() -> None:
    workload = WorkloadSpec(rate_rps=1.0, prompt=Fixed(tokens=9), output=Fixed(tokens=1)).build(0)
    n = workload.num_requests
    shares = judge(e2e={50.0: 2.0}).shares(workload, np.ones(n), np.zeros(n), np.arange(n))
    assert "tpot p90" not in shares and shares["e2e p50"] == 1.0


def test_schedulers_are_told_seconds() -> None:
    """TTFT of the highest rank up to 90, TPOT of the highest of all."""
    told = policy_of(judge(tpot={50.0: 1.25, 99.0: 5.0}), SPEC).default
    assert (told.ttft_s, told.tpot_s) == (pytest.approx(3.0), pytest.approx(0.5))


def test_targets_are_scaled_by_kind() -> None:
    scaled = judge(e2e={50.0: 2.0}).targets.scaled(0.5, 2.0)
    assert (scaled.ttft[90.0], scaled.tpot[90.0], scaled.e2e[50.0]) == (1.5, 3.0, 4.0)


@pytest.mark.parametrize(
    ("change", "where"),
    [
        ({"reference": None}, "slo.slowdown.reference"),
        ({"ttft": {"90": 3}}, "slo.slowdown.ttft.90"),
        ({"ttft": {"p90": 0}}, "slo.slowdown.ttft.p90"),
        ({"ttft": {"p50": 3, "p90": 2}}, "slo.slowdown.ttft"),
        ({"tpot": None}, "slo.slowdown.tpot"),
        ({"tbt": {"p90": 2}}, "slo.slowdown.tbt"),
        ({"tensor_parallel": 0}, "slo.slowdown.tensor_parallel"),
    ],
)
def test_a_wrong_section_is_refused_with_its_key(change: dict[str, Any], where: str) -> None:
    section = {key: value for key, value in {**SECTION, **change}.items() if value is not None}
    with pytest.raises(InvalidConfig) as caught:
        parse_slowdown({"slowdown": section})
    assert caught.value.where == where


def test_seconds_beside_slowdowns_are_refused() -> None:
    with pytest.raises(InvalidConfig, match=r"slo\.ttft_ms.*beside slowdown"):
        parse_slowdown({"slowdown": SECTION, "ttft_ms": 5})
