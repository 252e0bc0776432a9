"""The pipeline stages of a simulated worker, and what its scheduler may predict with."""

from __future__ import annotations

from ...engine.step_time import StepFeatures, StepTime
from ...engine.step_time_online import OnlineStepTime
from .cores import SharedCores
from .deployment import Overheads, WorkerModel

LEARNT = 8  # of so many decode steps one is learnt from: what follows closely differs little


class Stages:
    """The stages of one worker's pipeline, each busy until a known time."""

    def __init__(self, model: WorkerModel, overheads: Overheads, cores: SharedCores | None) -> None:
        """`cores`: that all workers share with the gateway and its clients."""
        self._times = model.latency.stages
        self._overheads = overheads
        self._cores = cores
        self._use = None if cores is None else cores.join()
        self.free_s = [0.0] * len(self._times)
        self.busy_s = 0.0  # of the first
        self.tokens = 0  # that the last step brings
        self._learnt: OnlineStepTime | None = None
        self._last = StepFeatures(), 0.0  # step, and when it began
        self._until_learning = 0  # decode steps

    def run(self, features: StepFeatures, now_s: float, num_prompts: int = 0) -> float:
        """Pass a step through all stages, the first free at `now_s`; returns when it is out,
        unless `late_s` says otherwise then."""
        free_s = self.free_s
        at_s = now_s
        self._last = features, now_s
        for i, time in enumerate(self._times):
            seconds = time.batch_s(features)
            if i == 0:
                seconds = self._in_service(seconds, features, num_prompts, now_s)
                self.busy_s += seconds
            free = free_s[i]
            at_s = free_s[i] = (at_s if at_s > free else free) + seconds
        if self._use is not None:
            self._use.end_s = free_s[0]
            self.tokens = features.decode_rows + num_prompts
        return at_s

    def predictor(self, model: WorkerModel, *, needed: bool) -> StepTime | None:
        """What the scheduler may predict with; None spares it the work where no target needs it.
        On shared cores it is what live schedulers learn as they serve: there a step takes more
        than the model says."""
        if not needed:
            return None
        if self._use is not None and len(self._times) == 1:
            self._learnt = OnlineStepTime()
            return self._learnt
        return self._times[0] if len(self._times) == 1 else PipelineTime(model.latency.stages)

    def ended(self, now_s: float) -> None:
        """The last step is done, and is learnt from."""
        if self._learnt is None:
            return
        features, begun_s = self._last
        self._until_learning -= 1
        if features.new_tokens or self._until_learning <= 0:
            self._learnt.observe(features, now_s - begun_s)
            self._until_learning = LEARNT

    def late_s(self) -> float:
        """What a step that should end now still lacks, because its core had other work; the first
        stage is free that much later. Told once."""
        if self._use is None:
            return 0.0
        late_s = self._use.take_late_s()
        self.free_s[0] += late_s
        self.busy_s += late_s
        return late_s

    def _in_service(
        self, alone_s: float, features: StepFeatures, num_prompts: int, now_s: float
    ) -> float:
        """What a step takes beside everything that serving it needs."""
        costs = self._overheads
        host_s = costs.step_s + costs.row_s * features.decode_rows
        share = 0.0
        if num_prompts:  # however many: most of a prompt's own is done while the step computes
            host_s += costs.prompt_s
            share = costs.prompt_share
        if self._cores is not None and self._use is not None:
            alone_s = self._cores.begin(self._use, features, alone_s, now_s)
            host_s = self._cores.host_s(self._use, host_s, now_s)
        return alone_s * (1 + share) + host_s


class PipelineTime:
    """A step through all stages. Is a `StepTime`."""

    def __init__(self, stages: tuple[StepTime, ...]) -> None:
        self._stages = stages

    def batch_s(self, features: StepFeatures) -> float:
        return sum([stage.batch_s(features) for stage in self._stages])
