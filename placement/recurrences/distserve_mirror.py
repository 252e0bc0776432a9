"""The request times that DistServe's own simulator gives, from its recurrences alone.

Same assumptions, so that a difference is a defect: first come, first served; a prefill batch
takes every waiting prompt that fits into `max_prefill_tokens`; a decode batch every waiting
request while Σ(context + 1) fits into `max_decode_tokens`; unfinished rows queue again behind
what arrived meanwhile; pipeline stages hand whole batches on, and waiting decode batches merge;
the least queued instance takes the next request; KV transfer costs nothing; the first stage of
either phase adds 2 ms and 1e-4 ms a token. Times are in milliseconds inside, seconds outside.
At one instant arrivals come before the end of a step.

An output of n tokens here is n decode iterations *after* the first token, as it counts them.
Prefill does not depend on decode, so it is worked out first; a stretch of decode steps in which
no request joins or leaves is one jump (its total is a quadratic in the number of steps).
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from math import inf

import numpy as np
from numpy.typing import NDArray

from ...engine.errors import InvalidConfig
from ..latency.distserve_profile import FIRST_STAGE_MS, FIRST_STAGE_MS_PER_TOKEN
from ..workload.workload import Workload
from .distserve_decode import MirrorPhase, decode_end_ms


@dataclass(frozen=True, kw_only=True, slots=True)
class MirrorTimes:
    """Per request, in the workload's order."""

    ttft_s: NDArray[np.float64]
    tpot_s: NDArray[np.float64]  # (last token − first token) / output tokens
    finish_s: NDArray[np.float64]


def mirror(workload: Workload, prefill: MirrorPhase, decode: MirrorPhase) -> MirrorTimes:
    """Simulate; raises InvalidConfig for a request that could never be scheduled."""
    prompts = workload.prompt_tokens.tolist()
    outputs = workload.output_tokens.tolist()
    check_fit(prompts, outputs, prefill.max_tokens, decode.max_tokens)
    arrival_ms = workload.arrival_s * 1000.0
    first_ms = np.array(prefill_end_ms(arrival_ms.tolist(), prompts, prefill))
    finish_ms = np.array(decode_end_ms(first_ms.tolist(), prompts, outputs, decode))
    return MirrorTimes(
        ttft_s=(first_ms - arrival_ms) / 1000.0,
        tpot_s=(finish_ms - first_ms) / workload.output_tokens / 1000.0,
        finish_s=finish_ms / 1000.0,
    )


def check_fit(prompts: list[int], outputs: list[int], prefill_max: int, decode_max: int) -> None:
    """Raises InvalidConfig for a request that no step could ever hold."""
    for i, (prompt, output) in enumerate(zip(prompts, outputs, strict=True)):
        if prompt > prefill_max or prompt + output > decode_max:
            raise InvalidConfig(
                f"workload request {i}",
                f"{prompt} + {output} tokens never fit ({prefill_max} and {decode_max})",
                "leave such requests out (max_total_tokens) or use more GPUs an instance",
            )


def prefill_end_ms(arrival_ms: list[float], prompts: list[int], phase: MirrorPhase) -> list[float]:
    """When each request's first token is there. Arrivals are sorted."""
    end_ms = [0.0] * len(prompts)
    pipelines = [_PrefillPipeline(phase, prompts, end_ms) for _ in range(phase.instances)]
    for request, at_ms in enumerate(arrival_ms):
        chosen = pipelines[0]
        if len(pipelines) > 1:
            for pipeline in pipelines:
                pipeline.advance(at_ms)
            chosen = min(pipelines, key=lambda p: p.load(at_ms))
        chosen.queue.append((at_ms, request))
    for pipeline in pipelines:
        pipeline.advance(inf)
    return end_ms


class _PrefillPipeline:
    """Batches leave the first stage in order, each later stage takes one at a time."""

    def __init__(self, phase: MirrorPhase, prompts: list[int], end_ms: list[float]) -> None:
        self.phase = phase
        self.prompts = prompts
        self.end_ms = end_ms  # written here
        self.queue: deque[tuple[float, int]] = deque()
        self.free_ms = [0.0] * phase.pipeline_parallel  # when each stage is done
        self.running = 0  # requests in the first stage

    def load(self, now_ms: float) -> int:
        return (self.running if self.free_ms[0] >= now_ms else 0) + len(self.queue)

    def advance(self, now_ms: float) -> None:
        """Start every batch that starts before `now_ms`."""
        queue, free_ms = self.queue, self.free_ms
        while queue:
            start_ms = max(free_ms[0], queue[0][0])
            if start_ms >= now_ms:
                return
            batch, tokens, squares = self._take(start_ms)
            step_ms = self.phase.coefficients.prefill_ms(tokens, squares, len(free_ms))
            at_ms = start_ms + (step_ms + (FIRST_STAGE_MS + tokens * FIRST_STAGE_MS_PER_TOKEN))
            free_ms[0] = at_ms
            self.running = len(batch)
            for stage in range(1, len(free_ms)):
                at_ms = free_ms[stage] = max(at_ms, free_ms[stage]) + step_ms
            for request in batch:
                self.end_ms[request] = at_ms

    def _take(self, start_ms: float) -> tuple[list[int], int, int]:
        batch, tokens, squares = [], 0, 0
        queue, prompts, limit = self.queue, self.prompts, self.phase.max_tokens
        while queue and queue[0][0] <= start_ms:
            length = prompts[queue[0][1]]
            if tokens + length > limit:
                break
            tokens += length
            squares += length * length
            batch.append(queue.popleft()[1])
        return batch, tokens, squares
