"""A prefill worker as it runs live, with step times where the runner would be."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from ..engine.batch import Batch, StepOutput
from ..engine.blocks import BlockAllocator
from ..engine.routing import WorkerView
from ..engine.step_time import StepFeatures, StepTime
from ..prefill_worker.scheduler import PrefillLimits, PrefillScheduler
from .deployment import Deployment, WorkerModel
from .simulated_request import Attempt, SimulatedSequence
from .simulated_run import WorkerUse

if TYPE_CHECKING:
    from .simulator import Simulator


class Stages:
    """The stages of one worker's pipeline, each busy until a known time."""

    def __init__(self, model: WorkerModel, step_s: float) -> None:
        self._times = model.latency.stages
        self._step_s = step_s
        self.free_s = [0.0] * len(self._times)
        self.busy_s = 0.0  # of the first

    def run(self, features: StepFeatures, now_s: float) -> float:
        """Pass a step through all stages, the first free at `now_s`; returns when it is out."""
        free_s = self.free_s
        at_s = now_s
        for i, time in enumerate(self._times):
            seconds = time.batch_s(features)
            if i == 0:
                seconds += self._step_s
                self.busy_s += seconds
            at_s = free_s[i] = max(at_s, free_s[i]) + seconds
        return at_s


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


class SimulatedPrefill:
    """One incarnation of a prefill worker."""

    role = "prefill"

    def __init__(self, model: WorkerModel, deployment: Deployment, simulator: Simulator) -> None:
        self.model = model
        self.simulator = simulator
        self.alive = True
        self.outstanding_tokens = 0  # as the router counts: sent, not handed over
        self.attempts: dict[Attempt, None] = {}  # with blocks or a place in the queue here
        self.allocator = BlockAllocator(
            model.num_blocks, deployment.block_size, prefix_cache=deployment.prefix_cache
        )
        self._stages = Stages(model, deployment.overheads.step_s)
        self._depth = len(model.latency.stages)
        self._in_flight = 0
        self._woken = False
        self._queued = 0  # unfinished prompts that no step has
        self._steps = self._tokens = self._peak = 0
        self._queued_reported = 0  # tokens, at the last step's end
        self.scheduler = PrefillScheduler(
            self.allocator,
            PrefillLimits(
                max_batch_tokens=model.max_batch_tokens,
                max_model_len=deployment.max_model_len,
                max_batch_size=model.max_batch_size,
                ttft_ms=deployment.ttft_ms,
                max_wait_s=deployment.max_wait_s,
                max_in_flight=self._depth,
            ),
            predictor(model, needed=deployment.ttft_ms > 0),
        )

    def add(self, attempt: Attempt, now_s: float) -> None:
        self.attempts[attempt] = None
        self._queued += 1
        self.scheduler.add(attempt.sequence, now_s)
        self.wake(now_s)

    def release(self, attempt: Attempt, now_s: float) -> None:
        """The prompt's KV is elsewhere, or nobody wants it any more."""
        del self.attempts[attempt]
        self.scheduler.release(attempt.sequence.id)
        self.wake(now_s)

    def wake(self, now_s: float) -> None:
        """Look for work once everything else of this moment has happened."""
        if self._queued and not self._woken and self._in_flight < self._depth:
            self._woken = True
            self.simulator.agenda.at(max(now_s, self._stages.free_s[0]), self._look)

    def view(self, _: float) -> WorkerView:
        return WorkerView(
            name=self.model.name,
            outstanding_tokens=max(self._queued_reported, self.outstanding_tokens),
            requests=len(self.attempts),
            free_blocks=self.allocator.num_free,
            total_blocks=self.allocator.num_blocks,
            max_batch_size=self.model.max_batch_size,
        )

    def use(self) -> WorkerUse:
        return WorkerUse(
            name=self.model.name,
            role=self.role,
            busy_s=self._stages.busy_s,
            steps=self._steps,
            tokens=self._tokens,
            preemptions=0,
            peak_blocks=self._peak,
            num_blocks=self.model.num_blocks,
        )

    def _look(self, now_s: float, _: Any) -> None:
        self._woken = False
        if self.alive and self._in_flight < self._depth:
            self._begin(now_s)

    def _begin(self, now_s: float) -> None:
        batch = self.scheduler.next_batch(now_s)
        if batch is None:
            return
        features = StepFeatures.of_chunks(zip(batch.counts, batch.starts, strict=True))
        end_s = self._stages.run(features, now_s)
        self._in_flight += 1
        self._queued -= batch.num_rows
        self._steps += 1
        self._tokens += features.new_tokens
        self._peak = max(self._peak, self.allocator.num_blocks - self.allocator.num_available)
        transfers = self.simulator.transfers
        for sequence, start, count in zip(batch.sequences, batch.starts, batch.counts, strict=True):
            attempt = cast(SimulatedSequence, sequence).attempt
            if start == sequence.cached_tokens:  # its first chunk
                if sequence.num_tokens + 1 < sequence.max_total_tokens:
                    transfers.ask(attempt, now_s)
                count += start  # what was found here is sent too
            transfers.chunk(attempt, count, now_s, end_s)
        self.simulator.agenda.at(end_s, self._end, batch)
        if self._in_flight < self._depth:
            self.wake(now_s)

    def _end(self, now_s: float, batch: Batch) -> None:
        if not self.alive:
            return
        self._in_flight -= 1
        output = StepOutput(token_ids=[0] * batch.num_rows)
        progress = self.scheduler.advance(batch, output, now_s)
        self._queued += batch.num_rows - len(progress.sequences)
        if self.simulator.views_matter:
            self._queued_reported = self.scheduler.load().queued_tokens
        finished = {sequence.id for sequence, _ in progress.finished}
        for sequence in batch.sequences:
            self.simulator.transfers.chunk_done(cast(SimulatedSequence, sequence).attempt, now_s)
        for sequence in progress.sequences:
            attempt = cast(SimulatedSequence, sequence).attempt
            ended = sequence.id in finished
            if ended:
                del self.attempts[attempt]
            self.simulator.prompt_done(attempt, now_s, ended=ended)
        if not self._queued:
            return
        if self._stages.free_s[0] <= now_s and not self._woken:
            self._begin(now_s)
        else:
            self.wake(now_s)
