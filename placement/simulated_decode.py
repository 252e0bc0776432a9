"""A decode worker as it runs live, with step times where the runner would be.

A stretch of steps in which nothing changes is one event. Step times are linear in context while
the rows stay the same, so a stretch takes first·k + slope·k(k − 1)/2. A call from outside in
mid-stretch ends it with the step in progress; that step's effect on sequences and blocks is
applied at once, which nobody can tell: rows and blocks of a step in flight are fixed.

A pipeline of p stages is p lanes: micro-batches with a scheduler and a p-th of the blocks each,
that take turns in the stages. Lanes are stepped through one by one.
"""

from __future__ import annotations

from math import inf, sqrt
from typing import TYPE_CHECKING, Any

from ..decode_worker.scheduler import DecodeLimits, DecodeScheduler
from ..engine.batch import Batch, StepOutput
from ..engine.blocks import BlockAllocator
from ..engine.routing import WorkerView
from ..engine.step_time import StepFeatures, features_of
from .deployment import Deployment, WorkerModel
from .simulated_prefill import Stages, predictor
from .simulated_request import Attempt, SimulatedSequence
from .simulated_run import WorkerUse
from .simulated_transfer import as_simulated

if TYPE_CHECKING:
    from .simulator import Simulator


class Stretch:
    """Steps of equal rows, each longer than the one before by the context it adds."""

    __slots__ = ("first_s", "num_steps", "slope_s", "start_s")

    def __init__(self, start_s: float, first_s: float, slope_s: float, num_steps: int) -> None:
        self.start_s = start_s
        self.first_s = first_s
        self.slope_s = slope_s
        self.num_steps = num_steps

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


class Lane:
    """One scheduler of a decode worker and the micro-batch it has in the pipeline."""

    def __init__(self, worker: SimulatedDecode, deployment: Deployment, share: int) -> None:
        model = worker.model
        self.worker = worker
        self.simulator = worker.simulator
        self.allocator = BlockAllocator(
            model.num_blocks // share,
            deployment.block_size,
            prefix_cache=deployment.prefix_cache,
        )
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
            predictor(model, needed=deployment.ttft_ms > 0 or deployment.tpot_ms > 0),
        )
        self.attempts: dict[Attempt, None] = {}  # that hold, or wait for, blocks here
        self._reported_tokens = 0  # queued and context, at the last step's end
        self._jumps = worker.simulator.jump and share == 1  # lanes wait for each other
        self._busy = False  # a step or a stretch is in progress
        self._woken = False
        self._stretch: Stretch | None = None
        self._ahead = False  # the step in progress was applied already
        self._rows = 0  # of the stretch
        self._held_tokens = 0  # at its start
        self._reserve: float = 0  # free blocks that it and the watermark need at most
        self._turn = 0  # an event of an earlier turn is stale
        self._unstarted = 0  # prompts computed here, without their first token

    # What comes in. A stretch is settled first.

    def lease(self, num_tokens: int, now_s: float) -> list[int] | None:
        """A stretch goes on where the pool surely holds all it needs, and these blocks too."""
        count = self.allocator.blocks_for(num_tokens)
        if self._stretch is None or self.allocator.num_free - count < self._reserve:
            self._settle(now_s)
        return self.scheduler.lease(num_tokens)

    def unlease(self, blocks: list[int], now_s: float) -> None:
        self._settle(now_s)
        self.scheduler.unlease(blocks)
        self.wake(now_s)

    def add(self, attempt: Attempt, now_s: float) -> None:
        """Compute the prompt here."""
        self._settle(now_s)
        self.attempts[attempt] = None
        self._unstarted += 1
        self.scheduler.add(attempt.sequence, now_s)
        self.wake(now_s)

    def go_on(self, attempt: Attempt, now_s: float) -> None:
        """The KV is here, and the gateway's word too."""
        self._settle(now_s)
        assert attempt.blocks is not None
        self.simulator.notes.transfer_s[attempt.row] = now_s - attempt.handed_s
        self.scheduler.resume(attempt.sequence, attempt.blocks, now_s)
        self.wake(now_s)

    def wait_for_room(self, attempt: Attempt, now_s: float) -> None:
        """The KV is parked. Prefill goes on holding its own sequence under the same id."""
        self._settle(now_s)
        self.attempts[attempt] = None
        attempt.sequence = SimulatedSequence(
            attempt.request, attempt, attempt.num_tokens + 1, attempt.sequence.block_hashes
        )
        self.scheduler.wait_for_room(attempt.sequence, now_s)
        self.wake(now_s)

    def abort(self, attempt: Attempt, now_s: float) -> None:
        """Forget a sequence that holds no blocks of its own yet."""
        self._settle(now_s)
        self.attempts.pop(attempt, None)
        self.scheduler.abort(attempt.request.id)
        self.wake(now_s)

    def stop(self, now_s: float) -> None:
        """The worker is dead: nothing of the step in progress was delivered."""
        if self._stretch is not None and (done := self._stretch.done(now_s)):
            self._apply(self._stretch, done, now_s)

    def delivered(self, attempt: Attempt) -> int:
        """Known tokens of a sequence on a stopped lane, without the step in progress."""
        tokens = attempt.sequence.num_tokens
        return max(tokens - 1, attempt.num_tokens + attempt.told) if self._ahead else tokens

    def reported(self, now_s: float) -> int:
        """Tokens queued and held, as told at the end of the last step before `now_s`."""
        done = 0 if self._stretch is None else self._stretch.done(now_s)
        return self._held_tokens + done * self._rows if done else self._reported_tokens

    def wake(self, now_s: float) -> None:
        """Look for work once everything else of this moment has happened."""
        if not self._busy and not self._woken:
            self._woken = True
            free_s = self.worker.stages.free_s[0]
            self.simulator.agenda.at(max(now_s, free_s), self._look)

    def _look(self, now_s: float, _: Any) -> None:
        self._woken = False
        if self.worker.alive and not self._busy:
            self._begin(now_s)

    def _begin(self, now_s: float) -> None:
        worker, scheduler = self.worker, self.scheduler
        if worker.stages.free_s[0] > now_s:  # another lane has the first stage
            self.wake(now_s)
            return
        for sequence, blocks in scheduler.next_fetches(now_s):
            self.simulator.transfers.fetch(as_simulated(sequence), blocks, now_s)
        if self._jumps:
            steps = scheduler.steady_steps()
            if steps > 1:
                self._jump(steps, now_s)
                return
        batch = scheduler.next_batch(now_s)
        if batch is None:
            return
        plain = not self._unstarted and sum(batch.counts) == len(batch.counts)
        if plain:
            features = StepFeatures(0, 0.0, len(batch.counts), sum(batch.starts))
        else:
            features = features_of(batch)
        end_s = worker.stages.run(features, now_s)
        worker.count(self, 1, features.new_tokens + features.decode_rows)
        self._busy = True
        self.simulator.agenda.at(end_s, self._end, batch)

    def _jump(self, steps: int, now_s: float) -> None:
        load = self.scheduler.load()
        rows, context = load.running, load.context_tokens
        time = self.worker.model.latency.stages[0]
        first_s = time.batch_s(StepFeatures(0, 0.0, rows, context))
        slope_s = time.batch_s(StepFeatures(0, 0.0, rows, context + rows)) - first_s
        first_s += self.worker.step_s
        self._stretch = Stretch(now_s, first_s, slope_s, steps)
        growth = rows * (steps // self.allocator.block_size + 1)
        self._reserve = inf if load.waiting else growth + rows
        self._rows = rows
        self._held_tokens = load.queued_tokens + context
        self._busy = True
        self._turn += 1
        self.simulator.agenda.at(self._stretch.end_s(steps), self._stretch_end, self._turn)

    def _settle(self, now_s: float) -> None:
        """End the stretch with the step in progress, and apply that already."""
        stretch = self._stretch
        if stretch is None:
            return
        done = stretch.done(now_s)
        end_s = stretch.end_s(done + 1)
        self._reported_tokens = self.reported(now_s)
        self._apply(stretch, done + 1, stretch.end_s(done))
        self._ahead = True
        self._turn += 1
        self.simulator.agenda.at(end_s, self._ahead_end, self._turn)

    def _apply(self, stretch: Stretch, steps: int, known_s: float) -> None:
        self._stretch = None
        self.scheduler.advance_steady(steps, known_s)
        self.worker.stages.busy_s += stretch.end_s(steps) - stretch.start_s
        self.worker.count(self, steps, steps * self._rows)

    def _stretch_end(self, now_s: float, turn: int) -> None:
        if turn != self._turn or not self.worker.alive:
            return
        assert self._stretch is not None
        self._apply(self._stretch, self._stretch.num_steps, now_s)
        self._report()
        self._busy = False
        self._begin(now_s)

    def _ahead_end(self, now_s: float, turn: int) -> None:
        if turn != self._turn or not self.worker.alive:
            return
        self._busy = self._ahead = False
        self._report()
        self._begin(now_s)

    def _end(self, now_s: float, batch: Batch) -> None:
        if not self.worker.alive:
            return
        self._busy = False
        output = StepOutput(token_ids=[0] * batch.num_rows)
        progress = self.scheduler.advance(batch, output, now_s)
        self._report()
        if self._unstarted:
            for sequence in progress.sequences:
                attempt = as_simulated(sequence).attempt
                if sequence.num_tokens == attempt.num_tokens + 1 and not attempt.told:
                    attempt.told = True
                    self._unstarted -= 1
                    self.simulator.prompt_done_here(attempt, now_s)
        for sequence, _ in progress.finished:
            attempt = as_simulated(sequence).attempt
            del self.attempts[attempt]
            self.simulator.finished(attempt, now_s)
        self._begin(now_s)

    def _report(self) -> None:
        if self.simulator.views_matter:
            load = self.scheduler.load()
            self._reported_tokens = load.queued_tokens + load.context_tokens


class SimulatedDecode:
    """One incarnation of a decode worker."""

    role = "decode"

    def __init__(self, model: WorkerModel, deployment: Deployment, simulator: Simulator) -> None:
        self.model = model
        self.simulator = simulator
        self.alive = True
        self.outstanding_tokens = 0  # as the router counts: sent, not ended
        self.requests = 0
        self.step_s = deployment.overheads.step_s
        self.stages = Stages(model, self.step_s)
        share = len(model.latency.stages)
        self.lanes = [Lane(self, deployment, share) for _ in range(share)]
        self._steps = self._tokens = self._peak = 0

    def lane_with_room(self) -> Lane:
        """The lane with the fewest sequences."""
        if len(self.lanes) == 1:
            return self.lanes[0]
        return min(self.lanes, key=lambda lane: len(lane.attempts))

    def count(self, lane: Lane, steps: int, tokens: int) -> None:
        self._steps += steps
        self._tokens += tokens
        self._peak = max(self._peak, lane.allocator.num_blocks - lane.allocator.num_available)

    def view(self, now_s: float) -> WorkerView:
        reported = sum([lane.reported(now_s) for lane in self.lanes])
        return WorkerView(
            name=self.model.name,
            outstanding_tokens=max(reported, self.outstanding_tokens),
            requests=self.requests,
            free_blocks=sum([lane.allocator.num_free for lane in self.lanes]),
            total_blocks=self.model.num_blocks,
            max_batch_size=self.model.max_batch_size,
        )

    def use(self) -> WorkerUse:
        return WorkerUse(
            name=self.model.name,
            role=self.role,
            busy_s=self.stages.busy_s,
            steps=self._steps,
            tokens=self._tokens,
            preemptions=sum(lane.scheduler.load().preemptions for lane in self.lanes),
            peak_blocks=self._peak,
            num_blocks=self.model.num_blocks,
        )
