"""What steps take in service, for recurrences: the model's time, and what was calibrated beside it.

The simulator spends the same overheads event by event (`simulation/stages.py`,
`simulation/cores.py`). A recurrence sees one worker, so of cores that are shared it says the mean
only. Without overheads step times are those of the model, to the last bit.
"""

from __future__ import annotations

from dataclasses import replace

from ...engine.step_time import StepFeatures, StepTime
from ..latency.phase_latency import PhaseLatency
from ..simulation.cores import HOME_SHARE
from ..simulation.deployment import Overheads

ROUNDS = 8  # of a fixed point: rows lengthen steps, and longer steps gather rows


class ServedStep:
    """A first stage's step in service. Is a `StepTime`; what prompts cost a step beside it whoever
    knows the number of steps adds (`Overheads.prompt_s`)."""

    def __init__(self, alone: StepTime, overheads: Overheads) -> None:
        self._alone, self._costs = alone, overheads

    def batch_s(self, features: StepFeatures) -> float:
        costs, alone_s = self._costs, self._alone.batch_s(features)
        if features.new_tokens:
            alone_s *= 1 + costs.prompt_share
        else:
            alone_s = max(0.0, alone_s - costs.warm_s)
        return alone_s + costs.step_s + costs.row_s * features.decode_rows


def in_service(latency: PhaseLatency, overheads: Overheads) -> PhaseLatency:
    """With what `seen_by` says a worker spends; the model's own times where that is nothing."""
    if overheads == Overheads():
        return latency
    first, *others = latency.stages
    return replace(latency, stages=(ServedStep(first, overheads), *others))


def seen_by(overheads: Overheads, workers: int) -> Overheads:
    """What each of so many equal workers spends, that of shared cores in its own steps.

    With a core to spare the gateway and its clients run there, and a worker that is alone finds its
    weights in the cache at every step. With as many workers as cores none is idle near goodput, and
    each waits for as long as its own tokens take to be served.
    """
    if not overheads.cores:
        return overheads
    served = replace(overheads, cores=0, serve_s=0.0, serve_row_s=0.0)
    if workers < overheads.cores:
        return served if workers == 1 else replace(served, warm_s=0.0)
    longer = 1 + overheads.crowd_share
    return replace(
        served,
        warm_s=0.0,
        step_s=served.step_s + longer * overheads.serve_s,
        row_s=served.row_s + longer * overheads.serve_row_s,
        prompt_s=served.prompt_s + longer * overheads.serve_row_s,
    )


def prefill_stretch(
    overheads: Overheads, prefill: int, decode: int, tokens_per_s: float, steps: PhaseLatency
) -> float:
    """How much longer prompts take beside decode workers on the same cores, at least 1.

    What serves a step's tokens runs on prefill's core for the most part, which is idle more often.
    `tokens_per_s` are all decode workers' together; rows by Little's law.
    """
    if not overheads.cores or prefill + decode < overheads.cores:
        return 1.0
    rows = 1.0
    for _ in range(ROUNDS):
        step_s = steps.total_s(StepFeatures(decode_rows=round(rows)))
        rows = max(1.0, tokens_per_s / decode * step_s)
    load = tokens_per_s * (overheads.serve_row_s + overheads.serve_s / rows)
    return 1 + HOME_SHARE * (1 + overheads.crowd_share) * load / prefill
