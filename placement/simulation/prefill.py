"""A prefill worker as it runs live, with step times where the runner would be.

Decides what it computes and how long that takes; who drives it says when.
"""

from __future__ import annotations

from ...engine.batch import Batch, Progress
from ...engine.blocks import BlockAllocator
from ...engine.step_time import StepFeatures
from ...prefill_worker.scheduler import PrefillLimits, PrefillScheduler
from .blocks import blocks_of
from .cores import SharedCores
from .deployment import Deployment, WorkerModel
from .run import WorkerUse
from .sequence import SimulatedSequence, output_of
from .stages import Stages


class SimulatedPrefill:
    """One incarnation of a prefill worker."""

    role = "prefill"

    def __init__(
        self, model: WorkerModel, deployment: Deployment, cores: SharedCores | None
    ) -> None:
        self.model = model
        self.alive = True
        self.woken = False  # somebody will look for work here
        self.outstanding_tokens = 0  # as the router counts: sent, not handed over
        self.members: dict[str, None] = {}  # ids with blocks or a place in the queue here
        self.allocator = blocks_of(model.num_blocks, deployment)
        self.stages = Stages(model, deployment.overheads, cores)
        self.reported = 0  # tokens queued at the last step's end
        self._depth = len(model.latency.stages)
        self._in_flight = 0
        self._queued = 0  # unfinished prompts that no step has
        self._steps = self._tokens = self._peak = 0
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
            self.stages.predictor(model, needed=deployment.ttft_ms > 0),
        )

    @property
    def may_begin(self) -> bool:
        """Whether a step could begin once the first stage is free."""
        return self._queued > 0 and self._in_flight < self._depth

    @property
    def requests(self) -> int:
        return len(self.members)

    def add(self, sequence: SimulatedSequence, now_s: float) -> None:
        self.members[sequence.id] = None
        self._queued += 1
        self.scheduler.add(sequence, now_s)

    def release(self, sequence_id: str) -> None:
        """The prompt's KV is elsewhere, or nobody wants it any more."""
        del self.members[sequence_id]
        self.scheduler.release(sequence_id)

    def begin(self, now_s: float) -> tuple[Batch, float] | None:
        """The next step and when it ends."""
        batch = self.scheduler.next_batch(now_s)
        if batch is None:
            return None
        features = StepFeatures.of_chunks(zip(batch.counts, batch.starts, strict=True))
        self._in_flight += 1
        self._queued -= len(batch.sequences)
        self._steps += 1
        self._tokens += features.new_tokens
        used = self.allocator.num_blocks - self.allocator.num_available
        if used > self._peak:
            self._peak = used
        return batch, self.stages.run(features, now_s, len(batch.counts))

    def end(self, batch: Batch, now_s: float) -> Progress:
        """The step's result; sequences that are finished altogether are gone."""
        self._in_flight -= 1
        self.stages.ended(now_s)
        progress = self.scheduler.advance(batch, output_of(len(batch.sequences)), now_s)
        self._queued += len(batch.sequences) - len(progress.sequences)
        for sequence, _ in progress.finished:
            del self.members[sequence.id]
        return progress

    def reported_tokens(self, now_s: float) -> int:
        return self.reported

    def report(self) -> None:
        """Tell the router what is queued."""
        self.reported = self.scheduler.load().queued_tokens

    def allocators(self) -> list[BlockAllocator]:
        return [self.allocator]

    def schedulers(self) -> list[PrefillScheduler]:
        return [self.scheduler]

    def use(self) -> WorkerUse:
        return WorkerUse(
            name=self.model.name,
            role=self.role,
            busy_s=self.stages.busy_s,
            steps=self._steps,
            tokens=self._tokens,
            preemptions=0,
            peak_blocks=self._peak,
            num_blocks=self.model.num_blocks,
            hit_tokens=self.scheduler.prefix.hit_tokens,
            asked_tokens=self.scheduler.prefix.asked_tokens,
        )
