"""What steps cost, for recurrences: whole prompts by stage, and rows by their context."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil, sqrt

import numpy as np
from numpy.typing import NDArray

from ...engine.step_time import StepFeatures
from .phase_latency import PhaseLatency

FloatColumn = NDArray[np.float64]
FAR = 1 << 20  # tokens of context, to read a slope
Slope = tuple[float, float]  # seconds of a step without context, seconds a token of it


class PromptCosts:
    """Seconds of steps of whole prompts, by pipeline stage."""

    def __init__(
        self,
        latency: PhaseLatency,
        prompts: Sequence[int],
        max_batch_tokens: int,
        prompt_s: float = 0.0,
    ) -> None:
        """`prompt_s`: of each step, beside the model's time."""
        self.latency = latency
        self.prompt_s = prompt_s
        self.prompts = prompts
        self.budget = max_batch_tokens
        self.bases = [stage.batch_s(StepFeatures()) for stage in latency.stages]
        alone: dict[int, list[float]] = {}
        for length in set(prompts):
            alone[length] = self._stages(length, length * length / 2, self._chunks(length))
        self._alone = alone

    def _chunks(self, tokens: int) -> int:
        return -(-tokens // self.budget)

    def _stages(self, tokens: int, attention: float, steps: int) -> list[float]:
        features = StepFeatures(new_tokens=tokens, attention=attention)
        seconds = [
            stage.batch_s(features) + (steps - 1) * base
            for stage, base in zip(self.latency.stages, self.bases, strict=True)
        ]
        seconds[0] += steps * self.prompt_s
        return seconds

    def alone(self, request: int) -> list[float]:
        return self._alone[self.prompts[request]]

    def alone_s(self) -> FloatColumn:
        """Of every request, queueing apart: what TTFT is at least."""
        return np.array([self.through(self._alone[length]) for length in self.prompts])

    def through(self, stages: list[float]) -> float:
        """A prompt's chunks follow each other through the stages without waiting for its end."""
        return sum(stages)

    def batch(self, requests: list[int]) -> list[float]:
        if len(requests) == 1:
            return self.alone(requests[0])
        lengths = [self.prompts[request] for request in requests]
        return self._stages(sum(lengths), sum(n * n for n in lengths) / 2, 1)

    def capacity_rps(self) -> float:
        """Prompts a second of one worker that never waits, in full steps."""
        busy, batch, tokens = 0.0, [], 0
        for request, length in enumerate(self.prompts):
            if batch and tokens + length > self.budget:
                busy += max(self.batch(batch))
                batch, tokens = [], 0
            batch.append(request)
            tokens += length
        return len(self.prompts) / (busy + max(self.batch(batch)))


class RowCosts:
    """Seconds of a decode step by rows, and by their context."""

    def __init__(self, latency: PhaseLatency) -> None:
        self.latency = latency
        self._known: dict[int, Slope] = {}

    def of(self, rows: int) -> Slope:
        known = self._known.get(rows)
        if known is None:
            base_s = self.latency.total_s(StepFeatures(decode_rows=rows))
            far_s = self.latency.total_s(StepFeatures(decode_rows=rows, decode_context=FAR))
            known = self._known[rows] = base_s, (far_s - base_s) / FAR
        return known


def steps_to(seconds: float, first_s: float, rise_s: float) -> int:
    """The least number of steps, each `rise_s` longer than the last, that takes `seconds`."""
    if rise_s <= 0:
        return max(1, ceil(seconds / first_s))
    half = first_s - rise_s / 2
    return max(1, ceil((sqrt(half * half + 2 * rise_s * seconds) - half) / rise_s))
