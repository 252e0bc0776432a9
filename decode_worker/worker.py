"""A decode worker: goes on where prefill stopped; computes prompts itself where it must.

Plain class over a scheduler, a compute thread and a KV endpoint; knows no process, RPC or Ray.
All methods run on one event loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

from ..engine.batch import Batch, Progress, StepOutput
from ..engine.compute import ComputeThread, Step, StepFailed
from ..engine.load import SchedulerLoad
from ..engine.report import Failed, FailureCode, Finished, Report
from ..engine.request import FinishReason, Request, TransferAddress
from ..engine.sequence import Sequence
from ..engine.step_clock import StepClock
from ..kv_transfer.events import Asked, Ended
from ..kv_transfer.ranked import Endpoint
from .incoming import Arrivals, Inbox
from .scheduler import DecodeScheduler

TOO_LONG = "prompt and max_tokens together exceed this worker's KV pool"


@dataclass(slots=True)
class Timings:
    """Seconds a sequence spent before its first token here."""

    transfer_s: float = 0.0  # handed over: from the resume until the KV was here
    prefill_s: float = 0.0  # computed here: from its first step to its first token


class DecodeWorker:
    """next batch, run, advance; sequences join as their KV arrives.

    Where the scheduler can say what follows a step before its tokens are known, that step runs
    while the loop takes and sends the earlier one's. Whoever comes in takes it back, unless it has
    begun.
    """

    def __init__(
        self,
        *,
        scheduler: DecodeScheduler,
        compute: ComputeThread,
        kv: Endpoint,
        orphan_s: float,
        clock: Callable[[], float],
    ) -> None:
        self.scheduler = scheduler
        self.compute = compute
        self.kv = kv
        self.clock = clock
        self.inbox = Inbox(
            scheduler,
            kv,
            block_size=compute.runner.layout.block_size,
            orphan_s=orphan_s,
            clock=clock,
        )
        self._live: dict[str, Timings] = {}  # by sequence id
        self._news = Report()  # what happened between steps
        self._wake = asyncio.Event()
        self._following: Step | None = None  # behind the step in flight
        self.steps = StepClock()

    def submit(self, request: Request) -> None:
        """Compute the prompt here, then decode."""
        if not self.scheduler.fits(request.max_total_tokens):
            self._fail(request.id, FailureCode.INVALID, TOO_LONG)
            return
        self._live[request.id] = Timings()
        self._take_back()
        self.scheduler.add(Sequence(request), self.clock())
        self._wake.set()

    def resume(
        self,
        request: Request,
        *,
        first_token: int,
        lease: int,
        granted: bool,
        source: TransferAddress,
    ) -> None:
        """Decode what a prefill worker handed over; the client has the first token already."""
        if not self.scheduler.fits(request.max_total_tokens):
            self.inbox.refuse(lease, source)
            self._fail(request.id, FailureCode.INVALID, TOO_LONG)
            return
        sequence = Sequence(request)
        sequence.append(first_token)
        self._live[request.id] = Timings()
        self.inbox.resume(sequence, lease=lease, granted=granted, source=source)
        self._take_arrivals()

    def abort(self, request_id: str) -> None:
        """Forget a request; its blocks are free once nobody writes to them."""
        if self._live.pop(request_id, None) is None:
            return
        if not self.inbox.abort(request_id):
            self.scheduler.abort(request_id)
        self._wake.set()

    def load(self) -> SchedulerLoad:
        return self.scheduler.load()

    @property
    def num_transfers(self) -> int:
        """Transfers into this worker that have not become a running sequence."""
        return len(self.inbox)

    @property
    def idle(self) -> bool:
        """Nothing queued, running, or on its way here."""
        return not self._live and not len(self.inbox)

    def sweep(self) -> None:
        """Called every heartbeat: drop what nobody will ask for any more."""
        self.inbox.sweep()
        self._wake.set()

    async def run(self) -> AsyncIterator[Report]:
        """Step for ever; yields each step's news. Cancel it to stop."""
        while True:
            self._wake.clear()
            step = self._following or self._start()
            self._following = self._start() if step is not None else None
            if step is not None:
                await self._finish(step)
            if self._news:
                report, self._news = self._news, Report()
                yield report
            elif step is None:
                await self._wake.wait()
            if step is not None:
                self.steps.end(step.batch)  # whoever reads the reports has sent this one

    async def follow_transfers(self) -> None:
        """Answer asks and take what arrives. Runs beside `run`, for ever."""
        async for event in self.kv.events():
            if isinstance(event, Asked):
                self.inbox.asked(event)
            elif isinstance(event, Ended):
                self.inbox.ended(event)
            else:
                self.inbox.released(event)
            self._take_arrivals()

    def _start(self) -> Step | None:
        """The next step, or the one that follows the step in flight, if there is one."""
        self.steps.begin()
        self.inbox.fetch()
        batch = self.scheduler.next_batch(self.clock())
        if batch is None:
            return None
        self.steps.scheduled()
        return self.compute.start(batch)

    def _take_back(self) -> None:
        """Somebody comes in, and need not wait for a step that has not begun."""
        step, in_flight = self._following, self.scheduler.in_flight
        if step is not None and in_flight.leaves_place and self.compute.recall(step):
            self._following = None
            in_flight.take_back()
            self.steps.recalled()

    async def _finish(self, step: Step) -> None:
        try:
            output, seconds = await self.compute.finish(step)
        except StepFailed as error:
            self._give_up(step.batch, str(error))
            return
        self.steps.ran(output.times)
        self.scheduler.observe(step.batch, seconds)
        self._publish(self.scheduler.advance(step.batch, output, self.clock()), output)

    def _publish(self, progress: Progress, output: StepOutput) -> None:
        news = self._news
        for sequence in progress.sequences:
            news.ids.append(sequence.id)
            if sequence.num_tokens == sequence.request.num_tokens + 1:
                self._note_first_token(sequence)
        news.token_ids.extend(progress.token_ids)
        if output.logprobs is not None:
            padding = len(news.ids) - len(progress.rows)
            earlier = news.logprobs or [None] * padding
            news.logprobs = earlier + [output.logprobs[row] for row in progress.rows]
        for sequence, reason in progress.finished:
            news.finished.append(self._finished(sequence, reason))

    def _note_first_token(self, sequence: Sequence) -> None:
        """Its prompt was computed here: a handed-over sequence came with its first token."""
        assert sequence.first_scheduled_s is not None, "a computed prompt was scheduled once"
        self._live[sequence.id].prefill_s = self.clock() - sequence.first_scheduled_s

    def _finished(self, sequence: Sequence, reason: FinishReason) -> Finished:
        timings = self._live.pop(sequence.id)
        started_s = sequence.first_scheduled_s  # None: its prompt was computed elsewhere
        return Finished(
            id=sequence.id,
            reason=reason,
            queue_s=0.0 if started_s is None else started_s - sequence.request.arrival_s,
            prefill_s=timings.prefill_s,
            transfer_s=timings.transfer_s,
            preemptions=sequence.num_preemptions,
            cached_tokens=sequence.cached_tokens,
        )

    def _take_arrivals(self) -> None:
        arrivals, self.inbox.news = self.inbox.news, Arrivals()
        if arrivals.ready:
            self._take_back()
        for sequence, seconds in arrivals.ready:
            self._live[sequence.id].transfer_s = seconds
        for sequence, reason in arrivals.lost:
            self._live.pop(sequence.id, None)
            self._fail(sequence.id, FailureCode.UNAVAILABLE, reason)
        self._wake.set()

    def _give_up(self, batch: Batch, reason: str) -> None:
        """The step broke: its rows that are left end, the worker lives."""
        for sequence in batch.sequences:
            if self._live.pop(sequence.id, None) is not None:
                self.scheduler.abort(sequence.id)
                self._fail(sequence.id, FailureCode.INTERNAL, reason)
        nothing = StepOutput(token_ids=[0] * batch.num_rows)  # nobody's
        self.scheduler.advance(batch, nothing, self.clock())

    def _fail(self, request_id: str, code: FailureCode, reason: str) -> None:
        self._news.failed.append(Failed(id=request_id, code=code, reason=reason))
        self._wake.set()
