"""A decode worker's scheduler and the steps it has in progress, taken singly or in stretches.

A stretch of steps in which nothing changes is one event. Step times are linear in context while
the rows stay the same, so a stretch takes first·k + slope·k(k − 1)/2. A call from outside in
mid-stretch ends it with the step in progress; that step's effect on sequences and blocks is
applied at once, which nobody can tell: rows and blocks of a step in flight are fixed.
"""

from __future__ import annotations

from math import inf, sqrt
from typing import NamedTuple

from ...decode_worker.scheduler import DecodeLimits, DecodeScheduler
from ...engine.batch import Batch
from ...engine.sequence import Sequence
from ...engine.step_time import StepFeatures, features_of
from ..latency.step_costs import RowCosts
from .blocks import blocks_of
from .deployment import Deployment, WorkerModel
from .sequence import SimulatedSequence, output_of
from .stages import Stages


class Stretch(NamedTuple):
    """Steps of equal rows, each longer than the one before by the context it adds."""

    start_s: float
    first_s: float
    slope_s: float
    num_steps: int
    rows: int

    def end_s(self, steps: int) -> float:
        """When so many steps are done."""
        return self.start_s + (steps * self.first_s + self.slope_s * (steps * (steps - 1) / 2))

    def done(self, now_s: float) -> int:
        """Steps that ended before `now_s`, less than all: the last ends with the stretch."""
        elapsed_s = now_s - self.start_s
        if self.slope_s > 0:
            b = self.first_s - self.slope_s / 2
            guess = (sqrt(b * b + 2 * self.slope_s * elapsed_s) - b) / self.slope_s
        else:
            guess = elapsed_s / self.first_s
        steps = min(self.num_steps - 1, max(0, int(guess) + 1))
        while steps and self.end_s(steps) >= now_s:
            steps -= 1
        return steps


class Ended(NamedTuple):
    """What a step or a stretch brought."""

    prompts: list[Sequence]  # computed here, and the first token is there
    finished: list[Sequence]


class Lane:
    """One scheduler of a decode worker and the micro-batch it has in the pipeline.

    While it is `busy` its step or stretch ends at `due_s`, to be told by `end(turn)`; a call that
    changes this has another `turn`.
    """

    def __init__(
        self,
        model: WorkerModel,
        deployment: Deployment,
        stages: Stages,
        *,
        share: int,
        jump: bool,
        views_matter: bool,
    ) -> None:
        self.stages = stages
        self.allocator = blocks_of(model.num_blocks // share, deployment)
        size = max(1, model.max_batch_size // share)
        self.scheduler = DecodeScheduler(
            self.allocator,
            DecodeLimits(
                max_batch_size=size,
                max_batch_tokens=max(size + 1, model.max_batch_tokens),
                max_model_len=deployment.max_model_len,
                ttft_ms=deployment.ttft_ms,
                tpot_ms=deployment.tpot_ms,
                max_wait_s=deployment.max_wait_s,
            ),
            stages.predictor(model, needed=deployment.ttft_ms > 0 or deployment.tpot_ms > 0),
        )
        self.members: dict[str, SimulatedSequence] = {}  # that hold, or wait for, blocks here
        self.parked: set[str] = set()  # of these, those whose KV waits in the prefill pool
        self.alive = True
        self.busy = False  # a step or a stretch is in progress
        self.woken = False  # somebody will look for work here
        self.due_s = 0.0
        self.turn = self.followed = 0  # of what is in progress; of what somebody waits for
        self.steps = self.tokens = self.peak = 0
        self._overheads = deployment.overheads
        self._costs = RowCosts(model.latency)
        self._jumps = jump
        alone = share == 1 and not deployment.overheads.cores
        self._longest = 1 << 40 if alone else 1  # lanes wait for each other, workers for cores
        self._views_matter = views_matter
        self._reported_tokens = 0  # queued and context, as told last
        self._told_until_s = inf  # when a step of the stretch ends, after which they are others
        self._held_tokens = 0  # at the stretch's start
        self._batch: Batch | None = None  # in progress, where it is no stretch
        self._stretch: Stretch | None = None
        self._ahead = False  # the step in progress was applied already
        self._reserve: float = 0  # free blocks that the stretch and the watermark need at most
        self._unstarted: dict[str, int] = {}  # prompts computed here, without their first token

    # What comes in. A stretch is settled first.

    def lease(
        self, sequence: SimulatedSequence, now_s: float
    ) -> tuple[list[int], list[int]] | None:
        """Blocks for a push: those that are here already, and leased ones for the rest. A
        stretch goes on where the pool surely holds all it needs, and these blocks too."""
        allocator, scheduler = self.allocator, self.scheduler
        num_tokens = sequence.num_tokens
        count = -(-num_tokens // allocator.block_size)
        if self._stretch is not None and allocator.num_free - count < self._reserve:
            self._settle(now_s)
        if allocator.prefixes is not None:
            return scheduler.lease_behind(count, scheduler.prefix.shareable(sequence, num_tokens))
        blocks = scheduler.lease(num_tokens)
        return None if blocks is None else ([], blocks)

    def unlease(self, found: list[int], blocks: list[int], now_s: float) -> None:
        self._settle(now_s)
        self.scheduler.unlease(blocks)
        self.scheduler.unhold(found)

    def add(self, sequence: SimulatedSequence, now_s: float) -> None:
        """Compute the prompt here."""
        self._settle(now_s)
        self.members[sequence.id] = sequence
        self._unstarted[sequence.id] = sequence.num_tokens
        self.scheduler.add(sequence, now_s)

    def resume(self, sequence: SimulatedSequence, blocks: list[int], now_s: float) -> None:
        """The KV is here, and the gateway's word too."""
        self._settle(now_s)
        self.scheduler.resume(sequence, blocks, now_s)

    def wait_for_room(self, sequence: SimulatedSequence, now_s: float) -> None:
        """The KV is parked in the prefill pool."""
        self._settle(now_s)
        self.members[sequence.id] = sequence
        self.parked.add(sequence.id)
        self.scheduler.wait_for_room(sequence, now_s)

    def abort(self, sequence_id: str, now_s: float) -> None:
        self._settle(now_s)
        self.members.pop(sequence_id, None)
        self.parked.discard(sequence_id)
        self._unstarted.pop(sequence_id, None)
        self.scheduler.abort(sequence_id)

    def stop(self, now_s: float) -> None:
        """The worker is dead: nothing of the step in progress was delivered."""
        if self._stretch is not None and (done := self._stretch.done(now_s)):
            self._apply(self._stretch, done, now_s)
        self.scheduler.settle()
        self.alive = False

    def delivered(self, sequence: SimulatedSequence, at_least: int) -> int:
        """Known tokens of a sequence on a stopped lane, without the step in progress."""
        tokens = sequence.num_tokens
        return max(tokens - 1, at_least) if self._ahead else tokens

    def reported_tokens(self, now_s: float) -> int:
        """Tokens queued and held, as told at the end of the last step before `now_s`."""
        if now_s > self._told_until_s and self._stretch is not None:
            self._tell(self._stretch, self._stretch.done(now_s))
        return self._reported_tokens

    # Steps.

    def next_fetches(self, now_s: float) -> list[tuple[Sequence, list[int]]]:
        """Parked sequences that there is room for, each with the blocks for what is missing."""
        fetches = self.scheduler.next_fetches(now_s)
        self.parked.difference_update([sequence.id for sequence, _ in fetches])
        return fetches

    def begin(self, now_s: float) -> bool:
        """Start a stretch, or a step; False without work."""
        if self._jumps:
            steps = self.scheduler.steady_steps()
            if steps:
                self._jump(min(steps, self._longest), now_s)
                return True
        batch = self.scheduler.next_batch(now_s)
        if batch is None:
            return False
        if not self._unstarted and sum(batch.counts) == len(batch.counts):
            features = StepFeatures(0, 0.0, len(batch.counts), sum(batch.starts))
        else:
            features = features_of(batch)
        self._batch = batch
        num_prompts = len(batch.counts) - features.decode_rows
        self._take(self.stages.run(features, now_s, num_prompts))
        self._count(1, features.new_tokens + features.decode_rows)
        return True

    def end(self, now_s: float) -> Ended:
        """What is in progress is done."""
        self.busy = self._ahead = False
        self.stages.ended(now_s)
        if self._batch is not None:
            ended = self._end_batch(self._batch, now_s)
        else:
            if self._stretch is not None:
                self._apply(self._stretch, self._stretch.num_steps, now_s)
            ended = Ended([], self.scheduler.end_steady())
        for sequence in ended.finished:
            del self.members[sequence.id]
        if self._views_matter:
            load = self.scheduler.load()
            self._reported_tokens = load.queued_tokens + load.context_tokens
        return ended

    def _end_batch(self, batch: Batch, now_s: float) -> Ended:
        self._batch = None
        progress = self.scheduler.advance(batch, output_of(len(batch.sequences)), now_s)
        prompts: list[Sequence] = []
        if self._unstarted:
            for sequence in progress.sequences:
                if self._unstarted.get(sequence.id) == sequence.num_tokens - 1:
                    del self._unstarted[sequence.id]
                    prompts.append(sequence)
        return Ended(prompts, [sequence for sequence, _ in progress.finished])

    def _jump(self, steps: int, now_s: float) -> None:
        rows, context, waiting = self.scheduler.steady_load()
        if self._longest == 1:
            self._stretch = None
            self.scheduler.advance_steady(1, now_s)
            self._take(self.stages.run(StepFeatures(0, 0.0, rows, context), now_s))
            self._count(1, rows)
            self._ahead = True
            return
        base_s, slope_s = self._costs.of(rows)
        first_s = base_s + slope_s * context
        first_s += self._overheads.step_s + self._overheads.row_s * rows
        stretch = self._stretch = Stretch(now_s, first_s, slope_s * rows, steps, rows)
        growth = rows * (steps // self.allocator.block_size + 1)
        self._reserve = inf if waiting else growth + rows
        if self._views_matter:
            self._held_tokens = self.scheduler.load().queued_tokens + context
            self._told_until_s = stretch.end_s(1)
        self._take(stretch.end_s(steps))

    def _take(self, end_s: float) -> None:
        self.busy = True
        self.turn += 1
        self.due_s = end_s

    def _settle(self, now_s: float) -> None:
        """End the stretch with the step in progress, and apply that already."""
        stretch = self._stretch
        if stretch is None:
            return
        done = stretch.done(now_s)
        if done:
            self._tell(stretch, done)
        self._apply(stretch, done + 1, stretch.end_s(done))
        self._ahead = True
        self._take(stretch.end_s(done + 1))

    def _tell(self, stretch: Stretch, done: int) -> None:
        """So many steps of the stretch have ended."""
        self._reported_tokens = self._held_tokens + done * stretch.rows
        self._told_until_s = stretch.end_s(done + 1) if done + 1 < stretch.num_steps else inf

    def _apply(self, stretch: Stretch, steps: int, known_s: float) -> None:
        self._stretch = None
        self.scheduler.advance_steady(steps, known_s)
        self.stages.busy_s += stretch.end_s(steps) - stretch.start_s
        self._count(steps, steps * stretch.rows)

    def _count(self, steps: int, tokens: int) -> None:
        self.steps += steps
        self.tokens += tokens
        used = self.allocator.num_blocks - self.allocator.num_available
        if used > self.peak:
            self.peak = used
