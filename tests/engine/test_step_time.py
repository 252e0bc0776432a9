"""The latency model's evaluation, given and learnt."""

from __future__ import annotations

import random

import pytest
from phasewise.engine.batch import Batch
from phasewise.engine.request import Request, SamplingParams
from phasewise.engine.sequence import Sequence
from phasewise.engine.step_time import (
    PiecewiseStepTime,
    StepCoefficients,
    StepFeatures,
    features_of,
    prefill_s,
)
from phasewise.engine.step_time_online import OnlineStepTime

TRUE = StepCoefficients(
    base_s=4e-3, new_token_s=1e-4, attention_s=2e-8, decode_row_s=1e-4, decode_context_s=1e-7
)


def test_a_prompt_in_chunks_has_the_attention_of_the_whole() -> None:
    whole = StepFeatures.of_chunks([(1000, 0)])
    chunks = StepFeatures.of_chunks([(400, 0), (350, 400), (250, 750)])
    assert chunks.new_tokens == whole.new_tokens
    assert chunks.attention == pytest.approx(whole.attention)


def test_distserve_prefill_and_decode_are_special_cases() -> None:
    a, b, c = 0.01, 2e-4, 3e-9
    step_time = PiecewiseStepTime(
        {
            0: StepCoefficients(base_s=a, new_token_s=b, attention_s=2 * c),
            1: StepCoefficients(base_s=0.02, decode_row_s=1e-5, decode_context_s=1e-7),
            95: StepCoefficients(base_s=0.03, decode_row_s=2e-5, decode_context_s=2e-7),
        }
    )
    prompts = [100, 900, 17]
    expected = a + b * sum(prompts) + c * sum(n * n for n in prompts)
    features = StepFeatures.of_chunks([(n, 0) for n in prompts])
    assert step_time.batch_s(features) == pytest.approx(expected, rel=1e-12)
    small = StepFeatures(decode_rows=94, decode_context=50_000)
    assert step_time.batch_s(small) == pytest.approx(0.02 + 94e-5 + 5e-3)
    large = StepFeatures(decode_rows=95, decode_context=50_000)
    assert step_time.batch_s(large) == pytest.approx(0.03 + 190e-5 + 1e-2)


def test_a_batch_is_read_as_decoding_rows_and_chunks() -> None:
    def sequence(num_tokens: int, num_prompt_tokens: int) -> Sequence:
        return Sequence(
            Request(
                id="",
                token_ids=(1,) * num_tokens,
                num_prompt_tokens=num_prompt_tokens,
                sampling=SamplingParams(),
            )
        )

    batch = Batch(
        sequences=[sequence(51, 50), sequence(1, 1), sequence(300, 300)],
        starts=[50, 0, 100],
        counts=[1, 1, 64],
    )
    assert features_of(batch) == StepFeatures(65, 0.5 + 64 * 132, 1, 50)


def test_prefill_in_more_chunks_costs_their_bases_too() -> None:
    once = prefill_s(TRUE, 500, 0, 512)
    assert once == pytest.approx(4e-3 + 500e-4 + 2e-8 * 500 * 250)
    assert prefill_s(TRUE, 500, 0, 128) == pytest.approx(once + 3 * 4e-3)


def steps(seed: int, count: int, *, chunks: bool | None = None) -> list[StepFeatures]:
    draw = random.Random(seed)
    made = []
    for _ in range(count):
        rows = draw.randint(1, 64)
        features = StepFeatures(0, 0.0, rows, rows * draw.randint(100, 2000))
        if draw.random() < 0.3 if chunks is None else chunks:
            features = features.with_chunk(draw.randint(16, 512), draw.randint(0, 3000))
        made.append(features)
    return made


def worst_error(learnt: OnlineStepTime, probes: list[StepFeatures]) -> float:
    return max(abs(learnt.batch_s(probe) / TRUE.batch_s(probe) - 1) for probe in probes)


def test_the_learnt_model_predicts_unseen_steps_despite_cold_and_slow_ones() -> None:
    draw = random.Random(1)
    learnt = OnlineStepTime()
    for index, features in enumerate(steps(2, 400)):
        measured_s = TRUE.batch_s(features) * draw.gauss(1, 0.05)
        if index < 5 or draw.random() < 0.03:
            measured_s *= 30
        learnt.observe(features, measured_s)
    assert worst_error(learnt, steps(3, 200)) < 0.1


def test_what_is_known_of_prefill_outlasts_a_long_stretch_of_decoding() -> None:
    learnt = OnlineStepTime()
    for features in steps(4, 300):
        learnt.observe(features, TRUE.batch_s(features))
    for features in steps(5, 5000, chunks=False):
        learnt.observe(features, TRUE.batch_s(features))
    assert worst_error(learnt, steps(6, 100, chunks=True)) < 0.05


def test_the_learnt_model_follows_a_machine_that_becomes_slower() -> None:
    learnt = OnlineStepTime()
    for features in steps(7, 500):
        learnt.observe(features, TRUE.batch_s(features) / 2)
    for features in steps(8, 1500):
        learnt.observe(features, TRUE.batch_s(features))
    assert worst_error(learnt, steps(9, 100)) < 0.1


def test_learnt_coefficients_are_never_negative_and_a_clock_that_stands_teaches_nothing() -> None:
    draw = random.Random(10)
    learnt = OnlineStepTime()
    for features in steps(11, 300):
        learnt.observe(features, draw.uniform(1e-3, 1e-1))
        learnt.observe(features, 0.0)
    frozen = learnt.coefficients()
    values = [frozen.base_s, frozen.new_token_s, frozen.attention_s]
    assert min(*values, frozen.decode_row_s, frozen.decode_context_s) >= 0
    probe = steps(12, 1)[0]
    assert frozen.batch_s(probe) == pytest.approx(learnt.batch_s(probe))
