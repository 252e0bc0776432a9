"""Workloads built from a plan file's section."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from phasewise.engine.errors import InvalidConfig
from phasewise.placement.workload import arrivals
from phasewise.placement.workload.lengths import fit_lognormal, lognormal_from_mean
from phasewise.placement.workload.workload import Workload, parse_workload

DATA = Path(__file__).parent / "data"
FIXED = {"prompt": 4000, "output": 500}


def build(seed: int = 0, **section: Any) -> Workload:
    return parse_workload(section, base=DATA).build(seed)


def burstiness(arrival_s: np.ndarray) -> float:
    """Coefficient of variation of the gaps: 0 uniform, 1 Poisson."""
    gaps = np.diff(arrival_s)
    return float(np.std(gaps) / np.mean(gaps))


def test_poisson_and_gamma_arrivals_have_their_rate_and_burstiness() -> None:
    rng = np.random.default_rng(0)
    for cv in (0.5, 1.0, 3.0):
        arrival_s = arrivals.gamma(40_000, 5.0, cv, rng)
        assert arrivals.mean_rate_rps(arrival_s) == pytest.approx(5.0, rel=0.05)
        assert burstiness(arrival_s) == pytest.approx(cv, rel=0.05)
    assert burstiness(arrivals.poisson(40_000, 5.0, rng)) == pytest.approx(1, rel=0.05)
    assert burstiness(arrivals.uniform(10, 5.0)) == pytest.approx(0, abs=1e-9)


def test_a_replay_keeps_burstiness_at_another_rate() -> None:
    workload = build(trace="azure2023_code.csv.gz", num_requests=10_000)
    assert burstiness(workload.arrival_s) == pytest.approx(13.2, rel=0.01)
    faster = workload.at_rate(8.0)
    assert faster.rate_rps == pytest.approx(8.0)
    assert burstiness(faster.arrival_s) == pytest.approx(13.2, rel=0.01)


def test_a_replayed_window_is_part_of_the_trace_and_moves_with_the_seed() -> None:
    spec = parse_workload({"trace": "azure2023_conv.csv.gz", "num_requests": 500}, base=DATA)
    one, other = spec.build(1), spec.build(2)
    assert one.num_requests == 500 and one.arrival_s[0] == 0
    assert not np.array_equal(one.prompt_tokens, other.prompt_tokens)
    assert np.array_equal(one.prompt_tokens, spec.build(1).prompt_tokens)


def test_the_same_seed_at_another_rate_has_the_same_requests() -> None:
    spec = parse_workload(
        {"rate_rps": 2, "lengths": {"prompt": {"mean": 900, "sigma": 1}, "output": 9}}
    )
    slow, fast = spec.build(7), spec.build(7, rate_rps=4.0)
    np.testing.assert_array_equal(slow.prompt_tokens, fast.prompt_tokens)
    np.testing.assert_allclose(slow.arrival_s, 2 * fast.arrival_s)


def test_rows_of_a_trace_keep_prompt_and_output_together() -> None:
    spec = parse_workload(
        {"trace": "nanoflow_sharegpt.csv.gz", "rate_rps": 1, "num_requests": 4000}, base=DATA
    )
    trace, workload = spec.trace, spec.build(0)
    assert trace is not None
    pairs = set(zip(trace.prompt_tokens.tolist(), trace.output_tokens.tolist(), strict=True))
    drawn = zip(workload.prompt_tokens.tolist(), workload.output_tokens.tolist(), strict=True)
    assert all(pair in pairs for pair in drawn)


def test_lognormal_lengths_have_the_mean_asked_for_and_can_be_fitted_back() -> None:
    drawn = lognormal_from_mean(4000, 0.8).sample(200_000, np.random.default_rng(0))
    assert drawn.mean() == pytest.approx(4000, rel=0.01)
    fitted = fit_lognormal(drawn)
    assert (fitted.median, fitted.sigma) == pytest.approx((4000 * np.exp(-0.32), 0.8), rel=0.01)


def test_fitted_lengths_resemble_the_trace() -> None:
    section = {"trace": "azure2023_conv.csv.gz", "arrivals": "poisson", "lengths": "fitted"}
    workload = build(**section, num_requests=20_000)
    assert np.median(workload.output_tokens) == pytest.approx(129, rel=0.35)
    assert workload.prompt_tokens.max() <= 14050
    assert workload.rate_rps == pytest.approx(5.53, rel=0.05)


def test_requests_too_long_are_left_out() -> None:
    for section in (
        {"trace": "nanoflow_sharegpt.csv.gz"},
        {"lengths": {"prompt": {"median": 1000, "sigma": 1.5}, "output": 100}},
    ):
        workload = build(**section, rate_rps=1, max_total_tokens=2048)
        assert (workload.prompt_tokens + workload.output_tokens).max() <= 2048


def test_classes_have_their_shares_and_prefixes_follow_their_requests() -> None:
    workload = build(
        trace="mooncake_conversation_head.jsonl.gz",
        arrivals="poisson",
        classes={"chat": 3, "batch": 1},
        num_requests=8000,
    )
    assert workload.class_ids is not None and workload.class_names == ("chat", "batch")
    assert np.mean(workload.class_ids == 0) == pytest.approx(0.75, abs=0.02)
    assert workload.prefix is not None
    blocks = -(-workload.prompt_tokens // 512)
    np.testing.assert_array_equal(np.diff(workload.prefix.offsets), blocks)
    head = workload.take(np.array([5, 90]))
    assert head.prefix is not None
    np.testing.assert_array_equal(head.prefix.of(1), workload.prefix.of(90))


@pytest.mark.parametrize(
    ("changes", "whole"),
    [({}, True), ({"num_requests": 100}, False), ({"arrivals": "poisson"}, False)],
)
def test_a_replay_that_is_the_same_for_all_seeds_is_known_as_such(
    changes: dict[str, Any], whole: bool
) -> None:
    section = {"trace": "mooncake_conversation_head.jsonl.gz", "rate_rps": 1, **changes}
    assert parse_workload(section, base=DATA).is_replayed_whole == whole
    again = [build(seed, **section).prompt_tokens for seed in (0, 1)]
    assert np.array_equal(*again) == whole


def test_columns_cannot_be_changed() -> None:
    workload = build(rate_rps=1, lengths=FIXED)
    with pytest.raises(ValueError, match="read-only"):
        workload.arrival_s[0] = 1.0


@pytest.mark.parametrize(
    ("section", "where"),
    [
        ({"lengths": FIXED}, "workload.rate_rps"),
        ({"rate_rps": 1}, "workload.lengths"),
        ({"rate_rps": 1, "lengths": "trace"}, "workload.lengths"),
        ({"rate_rps": -1, "lengths": FIXED}, "workload.rate_rps"),
        ({"rate_rps": 1, "lengths": FIXED, "cv": 3}, "workload.cv"),
        ({"rate_rps": 1, "lengths": FIXED, "arrivals": "posson"}, "workload.arrivals"),
        ({"rate_rps": 1, "lengths": FIXED, "arrivals": "trace"}, "workload.arrivals"),
        ({"rate": 1, "lengths": FIXED}, "workload.rate"),
        ({"rate_rps": 1, "lengths": {"prompt": 0, "output": 1}}, "workload.lengths.prompt"),
        ({"rate_rps": 1, "lengths": {"prompt": 5}}, "workload.lengths.output"),
        (
            {"rate_rps": 1, "lengths": {"prompt": {"mean": 5}, "output": 1}},
            "workload.lengths.prompt",
        ),
        ({"rate_rps": 1, "lengths": FIXED, "num_requests": 2.5}, "workload.num_requests"),
        ({"rate_rps": 1, "lengths": FIXED, "classes": {"a": 0}}, "workload.classes.a"),
        ({"rate_rps": "1e9", "lengths": FIXED}, "workload.rate_rps"),
        ({"rate_rps": 1, "lengths": FIXED, "format": "azure"}, "workload.format"),
    ],
)
def test_a_wrong_section_is_refused_with_its_key(section: dict[str, Any], where: str) -> None:
    with pytest.raises(InvalidConfig) as caught:
        parse_workload(section)
    assert caught.value.where == where


def test_how_many_requests_are_too_long_is_known() -> None:
    trace = {"trace": "azure2023_conv.csv.gz", "max_total_tokens": 4096}
    assert parse_workload(trace, base=DATA).left_out_share == pytest.approx(0.083, abs=0.001)
    wide = {"prompt": {"median": 100, "sigma": 1.0}, "output": 1}
    drawn = parse_workload({"rate_rps": 1, "lengths": wide, "max_total_tokens": 101})
    assert drawn.left_out_share == pytest.approx(0.5, abs=0.02)
    assert replace(drawn, max_total_tokens=None).left_out_share == 0


def test_one_request_has_no_rate() -> None:
    workload = build(rate_rps=1, lengths=FIXED, num_requests=1)
    with pytest.raises(InvalidConfig, match="2 or more"):
        assert workload.rate_rps


def test_lengths_of_which_few_fit_are_drawn_until_they_do() -> None:
    rare = {"prompt": {"median": 120, "sigma": 0.8}, "output": {"median": 60, "sigma": 0.6}}
    workload = build(lengths=rare, rate_rps=1, max_total_tokens=50, num_requests=500)
    assert (workload.prompt_tokens + workload.output_tokens).max() <= 50


def test_a_limit_that_no_request_meets_is_named() -> None:
    with pytest.raises(InvalidConfig, match="no request"):
        build(rate_rps=1, lengths=FIXED, max_total_tokens=100)
