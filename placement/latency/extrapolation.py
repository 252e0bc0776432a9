"""Which of the steps that a workload asks for lie beyond what step times were measured at.

Asked are the last chunk of the longest prompt, and a decode step of mean size: rows by Little's
law, each with the context that a row has on the mean. What lies within says nothing of how well it
was measured, and step times that stand on a formula alone have no limits.
"""

from __future__ import annotations

import numpy as np

from ...engine.step_time import StepFeatures
from ..workload.workload import Workload
from .phase_latency import PhaseLatency, prompt_features


def longest_chunk(workload: Workload, max_batch_tokens: int) -> StepFeatures:
    """The last chunk of the longest prompt, alone in its step."""
    longest = int(workload.prompt_tokens.max())
    chunk = min(longest, max_batch_tokens)
    return prompt_features(chunk, longest - chunk)


def mean_decode_step(
    workload: Workload, *, rate_rps: float, tpot_s: float, workers: int
) -> StepFeatures:
    """Of each of so many workers together, at requests a second and seconds a token."""
    later = np.maximum(workload.output_tokens.astype(np.float64) - 1, 0)
    if not later.any():
        return StepFeatures()
    rows = max(1, round(rate_rps * float(later.mean()) * tpot_s / workers))
    context = float(np.average(workload.prompt_tokens + later / 2, weights=later))
    return StepFeatures(decode_rows=rows, decode_context=round(rows * context))


def beyond(latency: PhaseLatency, chunk: StepFeatures, decode: StepFeatures) -> list[str]:
    """In words, what exceeds the limits of the phase: of prefill the chunk, of decode the step,
    of mixed steps either."""
    steps = {"prefill": (chunk,), "decode": (decode,), "mixed": (chunk, decode)}[latency.phase]
    return [
        f"{latency.phase} at TP{latency.tensor_parallel} is extrapolated: {asked:,.0f} {what}, "
        f"known up to {known:,.0f}"
        for step in steps
        for what, asked, known in latency.limits.exceeded_by(step)
    ]
