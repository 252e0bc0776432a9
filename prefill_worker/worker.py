"""A prefill worker: computes prompts, samples the first token, hands the rest over.

Plain class over a scheduler, a compute thread and a KV endpoint; knows no process, RPC or Ray.
All methods run on one event loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

from ..engine.batch import Batch, Progress, StepOutput
from ..engine.compute import ComputeThread, StepFailed
from ..engine.load import SchedulerLoad
from ..engine.report import Failed, FailureCode, Finished, Report
from ..engine.request import Handoff, Request, TransferAddress
from ..engine.sequence import Sequence
from ..engine.step_clock import StepClock
from ..kv_transfer.events import Asked, Ended
from ..kv_transfer.layer_clock import LayerClock
from ..kv_transfer.ranked import Endpoint
from .outgoing import Outbox
from .scheduler import PrefillScheduler


class PrefillWorker:
    """next batch, run, advance; and the KV of what was computed is on its way out."""

    def __init__(
        self,
        *,
        scheduler: PrefillScheduler,
        compute: ComputeThread,
        kv: Endpoint,
        address: TransferAddress,
        transfer_mode: str,
        clock: Callable[[], float],
    ) -> None:
        self.scheduler = scheduler
        self.compute = compute
        self.kv = kv
        self.address = address
        self.clock = clock
        self.outbox = Outbox(kv, compute.runner.layout, mode=transfer_mode, clock=clock)
        self._decode: dict[str, TransferAddress] = {}  # where each request goes on
        self._news = Report()  # what happened between steps
        self._wake = asyncio.Event()
        self.steps = StepClock()

    def submit(self, request: Request, decode: TransferAddress) -> None:
        """Queue a prompt whose KV is meant for `decode`."""
        if not self.scheduler.fits(request.num_tokens):
            self._fail(request.id, FailureCode.INVALID, "the prompt exceeds this worker's KV pool")
            return
        self._decode[request.id] = decode
        self.scheduler.add(Sequence(request), self.clock())
        self._wake.set()

    def abort(self, request_id: str) -> None:
        """Forget a request that was not handed over yet; its KV goes nowhere."""
        if self._decode.pop(request_id, None) is not None:
            self.scheduler.abort(request_id)
            self.outbox.drop(request_id)
            self._wake.set()

    def load(self) -> SchedulerLoad:
        return self.scheduler.load()

    def sweep(self) -> None:
        """Called every heartbeat: no queued prompt waits on a missed wake-up."""
        self._wake.set()

    @property
    def num_transfers(self) -> int:
        """Prompts whose KV has not left this worker."""
        return len(self.outbox)

    @property
    def idle(self) -> bool:
        """Nothing queued, running or waiting to be fetched."""
        return not self._decode and not len(self.outbox)

    async def run(self) -> AsyncIterator[Report]:
        """Step for ever; yields each step's news. Cancel it to stop."""
        while True:
            self._wake.clear()
            self.steps.begin()
            batch = self.scheduler.next_batch(self.clock())
            if batch is not None:
                await self._step(batch)
            if self._news:
                report, self._news = self._news, Report()
                yield report
            elif batch is None:
                await self._wake.wait()
            if batch is not None:
                self.steps.end(batch)  # whoever reads the reports has sent this one

    async def follow_transfers(self) -> None:
        """Release blocks as their transfers end. Runs beside `run`, for ever."""
        async for event in self.kv.events():
            if isinstance(event, Ended):
                sequence = self.outbox.ended(event.lease)
                if sequence is not None:
                    self.scheduler.release(sequence.id)
                    self._wake.set()
            elif isinstance(event, Asked):
                self.kv.answer(event, None)  # this role grants no blocks

    async def _step(self, batch: Batch) -> None:
        layers = LayerClock(self.compute.watched, self.kv.mark)
        self._begin(batch, layers)
        try:
            self.steps.scheduled()
            output, seconds = await self.compute.run(batch, layers.finish)
        except StepFailed as error:
            layers.fail()
            self._give_up(batch, str(error))
            return
        self.steps.ran(output.times)
        self.scheduler.observe(batch, seconds)
        progress = self.scheduler.advance(batch, output, self.clock())
        self._hand_over(progress, output)

    def _begin(self, batch: Batch, layers: LayerClock) -> None:
        """Start the transfers of the rows that start, and send every row's chunk as it comes."""
        for sequence, start, count in zip(batch.sequences, batch.starts, batch.counts, strict=True):
            ends_here = sequence.max_total_tokens == sequence.num_tokens + 1
            if start == sequence.cached_tokens and not ends_here:
                names = self.scheduler.prefix.shareable(sequence, sequence.num_tokens)
                num_ready = start // self.compute.runner.layout.block_size
                self.outbox.begin(sequence, self._decode[sequence.id], names, num_ready)
            self.outbox.chunk(sequence, start, count, layers)

    def _hand_over(self, progress: Progress, output: StepOutput) -> None:
        finished = {sequence.id: reason for sequence, reason in progress.finished}
        for sequence, token_id, row in zip(
            progress.sequences, progress.token_ids, progress.rows, strict=True
        ):
            self._decode.pop(sequence.id, None)
            logprobs = output.logprobs[row] if output.logprobs else None
            queue_s, prefill_s = self._timings(sequence)
            if sequence.id in finished:
                self.outbox.drop(sequence.id)
                self._news.add_token(sequence.id, token_id, logprobs)
                self._news.finished.append(
                    Finished(
                        id=sequence.id,
                        reason=finished[sequence.id],
                        queue_s=queue_s,
                        prefill_s=prefill_s,
                        cached_tokens=sequence.cached_tokens,
                    )
                )
                continue
            outgoing = self.outbox.finish(sequence)
            self._news.handoffs.append(
                Handoff(
                    request=sequence.request,
                    first_token=token_id,
                    first_logprobs=logprobs,
                    lease=outgoing.lease,
                    granted=outgoing.granted,
                    source=self.address,
                    queue_s=queue_s,
                    prefill_s=prefill_s,
                    cached_tokens=sequence.cached_tokens,
                )
            )

    def _timings(self, sequence: Sequence) -> tuple[float, float]:
        """Seconds in the queue, and from the first chunk to the first token."""
        started_s = sequence.first_scheduled_s
        assert started_s is not None, "a computed prompt was scheduled once"
        return started_s - sequence.request.arrival_s, self.clock() - started_s

    def _give_up(self, batch: Batch, reason: str) -> None:
        """The step broke: its rows end, the worker lives."""
        for sequence in batch.sequences:
            self.abort(sequence.id)
            self._fail(sequence.id, FailureCode.INTERNAL, reason)
        nothing = StepOutput(token_ids=[-1] * batch.num_rows)
        self.scheduler.advance(batch, nothing, self.clock())

    def _fail(self, request_id: str, code: FailureCode, reason: str) -> None:
        self._news.failed.append(Failed(id=request_id, code=code, reason=reason))
        self._wake.set()
