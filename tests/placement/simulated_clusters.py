"""Small clusters for the simulator's tests."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from phasewise.engine.step_time import PiecewiseStepTime, StepCoefficients, StepTime
from phasewise.placement.latency.phase_latency import Limits, Phase, PhaseLatency
from phasewise.placement.simulation.deployment import Deployment, replicas
from phasewise.placement.workload.workload import Workload

STEP = StepCoefficients(
    base_s=0.004,
    new_token_s=0.0001,
    attention_s=1e-8,
    decode_row_s=0.0002,
    decode_context_s=1e-7,
)


def latency(time: StepTime = STEP, *, phase: Phase = "mixed", stages: int = 1) -> PhaseLatency:
    return PhaseLatency(
        hardware="made up",
        model="made up",
        phase=phase,
        tensor_parallel=1,
        stages=(time,) * stages,
        limits=Limits(),
        origin="made up",
    )


def constant(seconds: float) -> StepTime:
    return PiecewiseStepTime({0: StepCoefficients(base_s=seconds)})


def pair(
    *,
    prefill: int = 1,
    decode: int = 1,
    prefill_time: StepTime = STEP,
    decode_time: StepTime = STEP,
    prefill_stages: int = 1,
    decode_stages: int = 1,
    num_blocks: int = 4000,
    max_batch_size: int = 64,
    max_batch_tokens: int = 2048,
    **changes: Any,
) -> Deployment:
    """Disaggregated, with KV of 1,000 bytes a token."""
    deployment = Deployment(
        prefill=replicas(
            "prefill",
            prefill,
            latency(prefill_time, stages=prefill_stages),
            num_blocks=num_blocks,
            max_batch_size=max_batch_size,
            max_batch_tokens=max_batch_tokens,
        ),
        decode=replicas(
            "decode",
            decode,
            latency(decode_time, stages=decode_stages),
            num_blocks=num_blocks,
            max_batch_size=max_batch_size,
            max_batch_tokens=max_batch_tokens,
        ),
        kv_bytes_per_token=1000.0,
        num_layers=10,
        local_prefill="never" if prefill else "always",
    )
    return replace(deployment, **changes)


def requests(
    count: int,
    rate_rps: float,
    *,
    seed: int = 0,
    prompt: tuple[int, int] = (20, 400),
    output: tuple[int, int] = (1, 120),
) -> Workload:
    """Poisson arrivals, uniform lengths from the given ranges."""
    rng = np.random.default_rng(seed)
    return Workload(
        arrival_s=np.cumsum(rng.exponential(1 / rate_rps, count)),
        prompt_tokens=rng.integers(prompt[0], prompt[1] + 1, count).astype(np.int32),
        output_tokens=rng.integers(output[0], output[1] + 1, count).astype(np.int32),
    )


def at(*rows: tuple[float, int, int]) -> Workload:
    """Requests given as (arrival, prompt, output)."""
    arrival_s, prompt, output = zip(*rows, strict=True)
    return Workload(
        arrival_s=np.array(arrival_s, dtype=float),
        prompt_tokens=np.array(prompt, dtype=np.int32),
        output_tokens=np.array(output, dtype=np.int32),
    )
