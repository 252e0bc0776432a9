"""Fitted step times: monotone, exact on what they can express, honest about the rest."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from phasewise.engine.errors import InvalidConfig
from phasewise.engine.step_time import StepCoefficients, StepFeatures
from phasewise.placement.latency.extrapolation import beyond, longest_chunk, mean_decode_step
from phasewise.placement.latency.fitting import (
    contradicted,
    fit_coefficients,
    fit_knots,
    medians,
    thinned,
)
from phasewise.placement.latency.phase_latency import (
    KnotStepTime,
    NoLatency,
    decode_features,
    prompt_features,
)
from phasewise.placement.latency.step_profile import (
    ProfilePoint,
    StepProfile,
    read_profile,
    write_profile,
)
from phasewise.placement.workload.lengths import Fixed
from phasewise.placement.workload.workload import WorkloadSpec

TRUE = StepCoefficients(
    base_s=5e-3, new_token_s=4e-5, attention_s=2e-9, decode_row_s=1e-5, decode_context_s=3e-8
)


def profiled(truth: StepCoefficients, tp: int = 1) -> list[ProfilePoint]:
    points = [
        ProfilePoint(phase="prefill", tp=tp, pp=1, new_tokens=n, context=c, batch=1, seconds=1.0)
        for n in (16, 64, 256, 1024, 2048)
        for c in (0, 512, 4096)
    ]
    points += [
        ProfilePoint(phase="decode", tp=tp, pp=1, new_tokens=1, context=c, batch=b, seconds=1.0)
        for b in (1, 4, 16, 64)
        for c in (32, 512, 4096)
    ]
    return [replace(point, seconds=truth.batch_s(point.features)) for point in points]


def profile(points: list[ProfilePoint]) -> StepProfile:
    return StepProfile(
        hardware="cpu", model="tiny", dtype="float32", origin="measured", points=tuple(points)
    )


def test_a_linear_truth_is_found_again() -> None:
    points = [(p.features, p.seconds) for p in profiled(TRUE)]
    fitted = fit_coefficients(points)
    for features, seconds in points:
        assert fitted.batch_s(features) == pytest.approx(seconds, rel=1e-6)


@pytest.mark.parametrize("phase", ["prefill", "decode", "mixed"])
def test_a_profile_predicts_between_its_points(phase: Any) -> None:
    latency = profile(profiled(TRUE)).phase(phase)
    for features in (prompt_features(700, 100), decode_features(24, 900)):
        if phase == "mixed" or (phase == "decode") == bool(features.decode_rows):
            assert latency.total_s(features) == pytest.approx(TRUE.batch_s(features), rel=0.02)


def test_fitted_times_never_fall_even_on_noisy_points() -> None:
    rng = np.random.default_rng(0)
    points = [(p.features, p.seconds * rng.lognormal(0, 0.3)) for p in profiled(TRUE)]
    fitted = fit_knots(points)
    for more in ((1, 0, 0, 0), (0, 9.0, 0, 0), (0, 0, 1, 0), (0, 0, 0, 50)):
        walk = [StepFeatures(*(k * m for m in more)) for k in range(0, 4000, 7)]
        times = [fitted.batch_s(features) for features in walk]
        assert all(a <= b for a, b in zip(times, times[1:], strict=False))


def test_one_wild_point_does_not_bend_the_rest() -> None:
    points = [(p.features, p.seconds) for p in profiled(TRUE)]
    wild = points[-1]
    points[-1] = (wild[0], wild[1] / 8)
    assert contradicted(points) == [points[-1]]
    fitted = fit_knots(points)
    for features, seconds in points[:-1]:
        assert fitted.batch_s(features) == pytest.approx(seconds, rel=0.03)
    whole = profile(
        [replace(p, seconds=s) for p, (_, s) in zip(profiled(TRUE), points, strict=True)]
    )
    assert "1 points left out" in whole.phase("decode").origin


def test_short_prompts_together_are_predicted_by_long_ones_alone() -> None:
    """Of prompts one at a time attention is half of tokens squared: it could be any bend."""
    truth = KnotStepTime([1, 256, 8192], [0.04, 0.05, 1.3], attention_s=6e-9)
    alone = [(f, truth.batch_s(f)) for f in (prompt_features(2**n) for n in range(7, 14))]
    fitted = fit_knots(alone)
    for prompts, tokens in ((8, 512), (16, 512), (4, 512)):
        together = StepFeatures.of_chunks([(tokens, 0)] * prompts)
        assert fitted.batch_s(together) == pytest.approx(truth.batch_s(together), rel=0.05)


def test_repeats_count_as_one_point() -> None:
    one = StepFeatures(new_tokens=4)
    assert medians([(one, 1.0), (one, 9.0), (one, 2.0)]) == [(one, 2.0)]


def test_knots_are_far_apart_and_keep_both_ends() -> None:
    kept = thinned(np.arange(1.0, 1001.0))
    assert kept[0] == 1 and kept[-1] == 1000
    assert all(b >= a * 2**0.5 for a, b in zip(kept, kept[1:], strict=False))


def test_answers_beyond_what_was_measured_say_so() -> None:
    latency = profile(profiled(TRUE)).phase("mixed")
    assert not latency.limits.exceeded_by(decode_features(64, 4096))
    assert latency.limits.exceeded_by(decode_features(65, 10))
    assert latency.limits.exceeded_by(prompt_features(4096))
    assert latency.limits.exceeded_by(prompt_features(2048, 9000))


def test_a_workload_that_asks_for_more_than_was_measured_is_told_in_words() -> None:
    """Measured up to 2,048 tokens and 64 rows. Little: 10 req/s · 100 tokens · 0.2 s = 200 rows."""
    workload = WorkloadSpec(
        rate_rps=10.0, prompt=Fixed(tokens=5000), output=Fixed(tokens=101), num_requests=4
    ).build(0)
    step = mean_decode_step(workload, rate_rps=10.0, tpot_s=0.2, workers=2)
    assert step == decode_features(100, 5050)
    source = profile(profiled(TRUE))
    for budget, beyond_measured in ((8192, True), (512, False)):
        chunk = longest_chunk(workload, budget)
        assert chunk == prompt_features(min(budget, 5000), 5000 - min(budget, 5000))
        words = beyond(source.phase("prefill"), chunk, step)
        assert any("5,000 new tokens" in line for line in words) == beyond_measured
    assert "100 decoding rows, known up to 64" in " ".join(
        beyond(source.phase("decode"), chunk, step)
    )
    within = decode_features(64, 10), prompt_features(128)
    assert not beyond(source.phase("mixed"), within[1], within[0])


def test_answers_of_one_token_ask_for_no_decode_step() -> None:
    workload = WorkloadSpec(rate_rps=1.0, prompt=Fixed(tokens=9), output=Fixed(tokens=1)).build(0)
    assert mean_decode_step(workload, rate_rps=1.0, tpot_s=0.0, workers=1) == StepFeatures()


def test_the_last_slope_goes_on_beyond_the_last_knot() -> None:
    curve = KnotStepTime([1, 10, 20], [1.0, 1.0, 3.0])
    assert [curve.curve_s(t) for t in (0, 1, 5, 15, 20, 30)] == pytest.approx([1, 1, 1, 2, 3, 5])


def test_a_pipeline_that_was_not_measured_is_divided_and_says_so() -> None:
    latency = profile(profiled(TRUE)).phase("decode", 1, 2)
    features = decode_features(16, 512)
    assert len(latency.stages) == 2 and "divided by 2" in latency.origin
    assert latency.total_s(features) == pytest.approx(TRUE.batch_s(features), rel=0.02)
    assert latency.interval_s(features) == pytest.approx(latency.total_s(features) / 2)


def test_parallelism_without_points_is_refused_with_what_there_is() -> None:
    with pytest.raises(NoLatency, match=r"\[\(2, 1\)\]"):
        profile(profiled(TRUE, tp=2)).phase("prefill", 4)


@pytest.mark.parametrize(
    ("sheet", "device", "same"),
    [
        ("h100", "NVIDIA H100 80GB HBM3", True),
        ("h200", "NVIDIA H200", True),
        ("a100-80g", "NVIDIA A100-SXM4-80GB", True),
        ("a100-40g", "NVIDIA A100-SXM4-80GB", False),
        ("h100", "NVIDIA H200", False),
        ("l40s", "NVIDIA L40S", True),
        ("mi300x", "AMD Instinct MI300X", True),
    ],
)
def test_a_profile_is_known_by_the_drivers_name_of_its_gpu(
    sheet: str, device: str, same: bool
) -> None:
    profile = StepProfile(hardware=device, model="m", dtype="", origin="", points=())
    if same:
        profile.require(hardware=sheet)
    else:
        with pytest.raises(InvalidConfig, match="was measured for"):
            profile.require(hardware=sheet)


def test_a_profile_survives_its_file_and_is_refused_for_other_hardware(tmp_path: Path) -> None:
    written = profile(profiled(TRUE))
    write_profile(written, tmp_path / "p.json")
    assert read_profile(tmp_path / "p.json") == written
    written.require(hardware="cpu", model="tiny")
    with pytest.raises(InvalidConfig, match="'cpu', not 'h100'"):
        written.require(hardware="h100")


@pytest.mark.parametrize(
    ("change", "where"),
    [
        ({"points": []}, "points"),
        ({"points": [{"phase": "prefill"}]}, "points[0]"),
        ({"points": "none"}, "points"),
        ({"format": "other"}, ""),
    ],
)
def test_a_broken_profile_is_refused_with_its_place(
    tmp_path: Path, change: dict[str, Any], where: str
) -> None:
    file = tmp_path / "p.json"
    write_profile(profile(profiled(TRUE)), file)
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(InvalidConfig) as caught:
        read_profile(file)
    assert caught.value.where == (f"{file}: {where}" if where else str(file))


@pytest.mark.parametrize("wrong", [{"seconds": -1}, {"batch": 0}, {"phase": "both"}, {"tp": "1"}])
def test_a_wrong_point_is_refused(tmp_path: Path, wrong: dict[str, Any]) -> None:
    file = tmp_path / "p.json"
    write_profile(profile(profiled(TRUE)), file)
    document = json.loads(file.read_text())
    document["points"][3] |= wrong
    file.write_text(json.dumps(document))
    with pytest.raises(InvalidConfig, match=r"points\[3\]"):
        read_profile(file)
