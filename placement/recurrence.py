"""Request times from DistServe-like recurrences over any step times: a search's pre-filter.

No KV transfer, chunks, preemption or deadlines: prompts are computed whole, first come, first
served, and a decode row that finds no memory waits. See `distserve_mirror` for every assumption.
The phases are apart, so that one prefill result serves many decode shapes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..engine.step_time import StepFeatures
from .deployment import Deployment
from .distserve_decode import MirrorPhase, decode_end_ms
from .distserve_mirror import prefill_end_ms
from .distserve_profile import FIRST_STAGE_MS, FIRST_STAGE_MS_PER_TOKEN
from .latency import PhaseLatency
from .simulated_run import StopRule
from .workload import FloatColumn, Workload


@dataclass(frozen=True, kw_only=True, slots=True)
class QuickTimes:
    """Columns in the workload's order. `stopped`: prefill alone missed too often, TPOT is NaN."""

    ttft_s: FloatColumn
    tpot_s: FloatColumn
    stopped: bool


class StepMilliseconds:
    """Any step times, asked in the recurrences' way; all stages are taken as equal.

    The recurrences add DistServe's own overhead to the first stage, so it is taken off here.
    """

    def __init__(self, latency: PhaseLatency) -> None:
        self._latency = latency
        one = latency.stages[0]
        self._total_s = one.batch_s if latency.pipeline_parallel == 1 else latency.total_s

    def prefill_ms(self, tokens: int, squares: int, stages: int) -> float:
        total_ms = self._total_s(StepFeatures(tokens, squares / 2)) * 1e3
        return (total_ms - FIRST_STAGE_MS - tokens * FIRST_STAGE_MS_PER_TOKEN) / stages

    def decode_ms(self, rows: int, context: int, stages: int) -> float:
        """`context` counts the tokens being computed, one a row."""
        before = context - rows
        total_ms = self._total_s(StepFeatures(0, 0.0, rows, before)) * 1e3
        return (total_ms - FIRST_STAGE_MS - before * FIRST_STAGE_MS_PER_TOKEN) / stages

    def decode_slope_ms(self, rows: int) -> float:
        """Step times are linear in context while the rows stay the same."""
        return self.decode_ms(rows, 2 * rows, 1) - self.decode_ms(rows, rows, 1)


def quick_prefill_s(
    workload: Workload, latency: PhaseLatency, *, instances: int = 1, max_batch_tokens: int = 2048
) -> FloatColumn:
    """When each first token is there. A longer prompt than a batch is a batch of its own."""
    prompts = workload.prompt_tokens.tolist()
    phase = MirrorPhase(
        coefficients=StepMilliseconds(latency),
        pipeline_parallel=latency.pipeline_parallel,
        instances=instances,
        max_tokens=max(max_batch_tokens, *prompts),
    )
    return np.array(prefill_end_ms((workload.arrival_s * 1e3).tolist(), prompts, phase)) / 1e3


def quick_decode_s(
    workload: Workload,
    first_s: FloatColumn,
    latency: PhaseLatency,
    *,
    instances: int = 1,
    kv_tokens: int = 1 << 40,
) -> FloatColumn:
    """When each last token is there, of requests handed over at `first_s`."""
    phase = MirrorPhase(
        coefficients=StepMilliseconds(latency),
        pipeline_parallel=latency.pipeline_parallel,
        instances=instances,
        max_tokens=kv_tokens,
    )
    last_s = first_s.copy()
    rows = np.flatnonzero(workload.output_tokens > 1)
    last_s[rows] = decode_end_ms(
        (first_s[rows] * 1e3).tolist(),
        workload.prompt_tokens[rows].tolist(),
        (workload.output_tokens[rows] - 1).tolist(),
        phase,
    )
    last_s[rows] /= 1e3
    return last_s


def quick_times(
    deployment: Deployment, workload: Workload, stop: StopRule | None = None
) -> QuickTimes:
    """Both phases of a disaggregated deployment whose pools hold equal workers."""
    prefill, decode = deployment.prefill[0], deployment.decode[0]
    first_s = quick_prefill_s(
        workload,
        prefill.latency,
        instances=len(deployment.prefill),
        max_batch_tokens=prefill.max_batch_tokens,
    )
    ttft_s = first_s - workload.arrival_s
    if stop is not None:
        counted = slice(stop.first_row, stop.last_row)
        if np.count_nonzero(ttft_s[counted] > stop.ttft_s[counted]) > stop.max_misses:
            return QuickTimes(ttft_s=ttft_s, tpot_s=np.full_like(ttft_s, np.nan), stopped=True)
    last_s = quick_decode_s(
        workload,
        first_s,
        decode.latency,
        instances=len(deployment.decode),
        kv_tokens=decode.num_blocks * deployment.block_size,
    )
    tpot_s = (last_s - first_s) / np.maximum(workload.output_tokens - 1, 1)
    return QuickTimes(ttft_s=ttft_s, tpot_s=tpot_s, stopped=False)
