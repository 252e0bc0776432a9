"""The pipeline stages of a simulated worker, and what its scheduler may predict with."""

from __future__ import annotations

from ..engine.step_time import StepFeatures, StepTime
from .deployment import Overheads, WorkerModel


class Stages:
    """The stages of one worker's pipeline, each busy until a known time.

    `machine` holds the stages of all workers that share cores, these among them.
    """

    def __init__(self, model: WorkerModel, overheads: Overheads, machine: list[Stages]) -> None:
        self._times = model.latency.stages
        self._overheads = overheads
        self._machine = machine
        machine.append(self)
        self.free_s = [0.0] * len(self._times)
        self.busy_s = 0.0  # of the first
        self._served_share = 0.0  # core time of the gateway and clients a second of its last step

    def run(self, features: StepFeatures, now_s: float, num_prompts: int = 0) -> float:
        """Pass a step through all stages, the first free at `now_s`; returns when it is out."""
        free_s = self.free_s
        at_s = now_s
        for i, time in enumerate(self._times):
            seconds = time.batch_s(features)
            if i == 0:
                seconds = self._in_service(seconds, features, num_prompts, now_s)
                self.busy_s += seconds
            free = free_s[i]
            at_s = free_s[i] = (at_s if at_s > free else free) + seconds
        return at_s

    def _in_service(
        self, alone_s: float, features: StepFeatures, num_prompts: int, now_s: float
    ) -> float:
        """What a step takes beside everything that serving it needs."""
        costs = self._overheads
        share = costs.prompt_share if num_prompts else 0.0
        rows_s = costs.row_s * features.decode_rows + costs.prompt_s * num_prompts
        seconds = alone_s * (1 + share) + costs.step_s + rows_s
        return seconds + self._serving_s(seconds, features, now_s) if costs.cores else seconds

    def _serving_s(self, seconds: float, features: StepFeatures, now_s: float) -> float:
        """What a step waits for the gateway and clients, once every core has a worker computing:
        their work for all these workers is spread evenly over the cores."""
        costs = self._overheads
        own_s = costs.serve_s + costs.serve_row_s * features.decode_rows
        self._served_share = own_s / seconds
        busy = [one for one in self._machine if one is not self and one.free_s[0] > now_s]
        if len(busy) + 1 < costs.cores:
            return 0.0
        return (own_s + seconds * sum([one._served_share for one in busy])) / costs.cores


class PipelineTime:
    """A step through all stages. Is a `StepTime`."""

    def __init__(self, stages: tuple[StepTime, ...]) -> None:
        self._stages = stages

    def batch_s(self, features: StepFeatures) -> float:
        return sum([stage.batch_s(features) for stage in self._stages])


def predictor(model: WorkerModel, *, needed: bool) -> StepTime | None:
    """What a scheduler may predict with; None spares it the work where no target needs it."""
    if not needed:
        return None
    stages = model.latency.stages
    return stages[0] if len(stages) == 1 else PipelineTime(stages)
