"""A decode worker as it runs live, with step times where the runner would be.

A pipeline of p stages is p lanes: micro-batches with a scheduler and a p-th of the blocks each,
that take turns in the stages.
"""

from __future__ import annotations

from ...decode_worker.scheduler import DecodeScheduler
from ...engine.blocks import BlockAllocator
from .cores import SharedCores
from .deployment import Deployment, WorkerModel
from .lane import Lane
from .run import WorkerUse
from .stages import Stages


class SimulatedDecode:
    """One incarnation of a decode worker."""

    role = "decode"

    def __init__(
        self,
        model: WorkerModel,
        deployment: Deployment,
        cores: SharedCores | None,
        *,
        jump: bool,
        views_matter: bool,
    ) -> None:
        self.model = model
        self.alive = True
        self.outstanding_tokens = 0  # as the router counts: sent, not ended
        self.requests = 0
        stages = self.stages = Stages(model, deployment.overheads, cores)
        share = len(model.latency.stages)
        self.lanes = [
            Lane(model, deployment, stages, share=share, jump=jump, views_matter=views_matter)
            for _ in range(share)
        ]

    def emptiest_lane(self) -> Lane:
        """The lane with the fewest sequences."""
        if len(self.lanes) == 1:
            return self.lanes[0]
        return min(self.lanes, key=lambda lane: len(lane.members))

    def reported_tokens(self, now_s: float) -> int:
        """Tokens queued and held, as its last messages say."""
        tokens = 0
        for lane in self.lanes:
            tokens += lane.reported_tokens(now_s)
        return tokens

    def allocators(self) -> list[BlockAllocator]:
        return [lane.allocator for lane in self.lanes]

    def schedulers(self) -> list[DecodeScheduler]:
        return [lane.scheduler for lane in self.lanes]

    def use(self) -> WorkerUse:
        prefixes = [lane.scheduler.prefix for lane in self.lanes]
        return WorkerUse(
            name=self.model.name,
            role=self.role,
            busy_s=self.stages.busy_s,
            steps=sum([lane.steps for lane in self.lanes]),
            tokens=sum([lane.tokens for lane in self.lanes]),
            preemptions=sum([scheduler.load().preemptions for scheduler in self.schedulers()]),
            peak_blocks=sum([lane.peak for lane in self.lanes]),
            num_blocks=self.model.num_blocks,
            hit_tokens=sum([prefix.hit_tokens for prefix in prefixes]),
            asked_tokens=sum([prefix.asked_tokens for prefix in prefixes]),
        )
