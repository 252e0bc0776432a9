"""The recurrences of one phase: against closed forms, and against steps taken one by one."""

from __future__ import annotations

import numpy as np
import pytest
from phasewise.engine.step_time import StepCoefficients
from phasewise.placement.latency.phase_latency import Limits, Phase, PhaseLatency
from phasewise.placement.latency.step_costs import PromptCosts, RowCosts, steps_to
from phasewise.placement.recurrences.phase_times import PoolLimits, decode_end_s, prefill_end_s
from phasewise.placement.recurrences.queueing import mean_ttft_pipeline_s, mean_ttft_s

N = 60_000


def latency(phase: Phase, *stages: StepCoefficients) -> PhaseLatency:
    return PhaseLatency(
        hardware="none",
        model="none",
        phase=phase,
        tensor_parallel=1,
        stages=stages,
        limits=Limits(),
        origin="made up",
    )


def poisson(rate_rps: float, n: int = N) -> np.ndarray:
    return np.cumsum(np.random.default_rng(3).exponential(1 / rate_rps, n))


@pytest.mark.parametrize("stages", [1, 2])
def test_prefill_alone_waits_as_long_as_m_d_1_says(stages: int) -> None:
    step = StepCoefficients(base_s=0.0, new_token_s=1e-3 / stages)
    costs = PromptCosts(latency("prefill", *[step] * stages), [100] * N, max_batch_tokens=100)
    arrival_s = poisson(7.0)
    end_s = np.array(prefill_end_s(costs, arrival_s.tolist(), 1, [1e9] * N))
    expected_s = mean_ttft_s(0.1, 7.0) if stages == 1 else mean_ttft_pipeline_s(0.1, 7.0)
    assert float(np.mean(end_s - arrival_s)) == pytest.approx(expected_s, rel=0.05)


def test_who_is_late_already_does_not_make_others_late() -> None:
    step = StepCoefficients(base_s=0.0, new_token_s=1e-3)
    costs = PromptCosts(latency("prefill", step), [100] * 2000, max_batch_tokens=100)
    arrival_s = poisson(10.5, 2000)  # more than the 10 a second that can be served
    for limit_s, least in ((0.5, 0.85), (1e9, 0.0)):
        waited = np.array(prefill_end_s(costs, arrival_s.tolist(), 1, [limit_s] * 2000))
        share = float(np.mean(waited - arrival_s <= 0.5))
        assert share > 0.85 if least else share < 0.5


def test_a_pool_of_two_serves_twice_the_rate_with_no_more_waiting() -> None:
    step = StepCoefficients(base_s=0.0, new_token_s=1e-3)
    costs = PromptCosts(latency("prefill", step), [100] * 5000, max_batch_tokens=100)
    means = []
    for workers in (1, 2):
        arrival_s = poisson(7.0 * workers, 5000)
        end_s = np.array(prefill_end_s(costs, arrival_s.tolist(), workers, [1e9] * 5000))
        means.append(float(np.mean(end_s - arrival_s)))
    assert means[1] < means[0]


def test_jumped_decode_steps_end_as_steps_taken_one_by_one() -> None:
    step = StepCoefficients(base_s=0.01, decode_row_s=1e-4, decode_context_s=2e-6)
    costs = RowCosts(latency("decode", step))
    rng = np.random.default_rng(5)
    prompts, outputs = rng.integers(10, 400, 60).tolist(), rng.integers(2, 90, 60).tolist()
    ready_s = np.sort(rng.uniform(0, 2, 60)).tolist()
    found = decode_end_s(costs, ready_s, prompts, outputs, 1, PoolLimits(max_batch_size=1000))
    assert found == pytest.approx(_one_by_one(step, ready_s, prompts, outputs), rel=1e-9)


def _one_by_one(
    step: StepCoefficients, ready_s: list[float], prompts: list[int], outputs: list[int]
) -> list[float]:
    """Whoever is there when a step starts is in it."""
    now_s, left, context = 0.0, {}, {}
    end_s = [0.0] * len(ready_s)
    waiting = list(range(len(ready_s)))
    while waiting or left:
        if not left:
            now_s = max(now_s, ready_s[waiting[0]])
        while waiting and ready_s[waiting[0]] <= now_s:
            request = waiting.pop(0)
            left[request], context[request] = outputs[request] - 1, prompts[request]
        now_s += (
            step.base_s
            + step.decode_row_s * len(left)
            + step.decode_context_s * sum(context.values())
        )
        for request in list(left):
            left[request] -= 1
            context[request] += 1
            if not left[request]:
                end_s[request] = now_s
                del left[request], context[request]
    return end_s


def test_rows_wait_for_memory_and_the_batch_size_is_kept() -> None:
    step = StepCoefficients(base_s=0.01)
    costs = RowCosts(latency("decode", step))
    ready_s, prompts, outputs = [0.0] * 4, [100] * 4, [11] * 4
    for limits in (PoolLimits(kv_tokens=220), PoolLimits(max_batch_size=2)):
        ends = sorted(decode_end_s(costs, ready_s, prompts, outputs, 1, limits))
        assert ends == pytest.approx([0.1, 0.1, 0.2, 0.2])


@pytest.mark.parametrize("rise_s", [0.0, 1e-4, 0.3])
def test_steps_to_a_time_are_the_least_that_reach_it(rise_s: float) -> None:
    for seconds in (0.001, 0.02, 0.5, 3.0):
        steps = steps_to(seconds, 0.02, rise_s)
        totals = [k * 0.02 + rise_s * k * (k - 1) / 2 for k in (steps - 1, steps)]
        assert totals[0] < seconds * (1 + 1e-9) and totals[1] >= seconds * (1 - 1e-9)
