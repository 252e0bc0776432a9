"""The open-loop load generator: sends when the workload says, whatever has been answered.

Latency counts from the intended send time, so that a client or server that falls behind shows in
the figures instead of thinning out the load (coordinated omission). How late the sends themselves
were is kept beside it: it tells when this process, not the cluster, is the bottleneck.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from math import nan

from ...configs.errors import PhasewiseError
from ..proto import phasewise_pb2 as pb

UNFINISHED = "Unfinished"  # cut off when the time was over
INCOMPLETE = "Incomplete"  # ended well with fewer tokens than asked for
LEAD_S = 0.05  # between the start and the first intended send
EARLY_S = 0.001  # a sleep rounds up to milliseconds: the last one before a send is not slept

Stream = Callable[[pb.GenerateRequest], AsyncIterator[pb.GenerateResponse]]


@dataclass(kw_only=True, slots=True)
class Sample:
    """What became of one request. Times in seconds on the generator's clock; NaN: never."""

    intended_s: float
    slo_class: str = "default"
    sent_s: float = nan
    first_s: float = nan  # first token
    last_s: float = nan  # latest token
    ended_s: float = nan
    tokens: int = 0
    gaps_s: list[float] = field(default_factory=list)  # between deliveries, after the first
    error: str = ""  # name of its type; "": answered in full
    reason: str = ""  # what the cluster said of it

    @property
    def ttft_s(self) -> float:
        return self.first_s - self.intended_s

    @property
    def tpot_s(self) -> float:
        """Mean over the tokens after the first; 0 for a single token."""
        return (self.last_s - self.first_s) / (self.tokens - 1) if self.tokens > 1 else 0.0

    @property
    def e2e_s(self) -> float:
        return self.last_s - self.intended_s

    @property
    def lateness_s(self) -> float:
        """Of the send itself."""
        return self.sent_s - self.intended_s


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """All samples of one load, in order of intended sends."""

    samples: list[Sample]
    began_s: float
    ended_s: float
    cpu_s: float  # of this process
    stopped: bool  # `on_end` asked for it


async def offer(
    stream: Stream,
    requests: Sequence[pb.GenerateRequest],
    arrival_s: Sequence[float],
    *,
    drain_s: float,
    on_end: Callable[[Sample], bool] = lambda _: True,
    clock: Callable[[], float] = time.perf_counter,
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
) -> Run:
    """Send every request at its time, then wait `drain_s` at most for the rest.

    `on_end` sees each sample as it ends and returns whether to go on; what is then under way is
    cut off, and what was not sent has no sample.
    """
    began_s, cpu_s = clock() + LEAD_S, time.process_time()
    samples: list[Sample] = []
    tasks: set[asyncio.Task[None]] = set()
    stop = asyncio.Event()

    async def one(request: pb.GenerateRequest, sample: Sample) -> None:
        await _follow(stream, request, sample, clock)
        if not on_end(sample):
            stop.set()

    try:
        for request, after_s in zip(requests, arrival_s, strict=True):
            intended_s = began_s + float(after_s)
            while (left_s := intended_s - clock()) > 0 and not stop.is_set():
                await sleep(max(0.0, left_s - EARLY_S))
            if stop.is_set():
                break
            samples.append(Sample(intended_s=intended_s, slo_class=request.slo_class))
            task = asyncio.create_task(one(request, samples[-1]))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
            await asyncio.sleep(0)  # it sends now, and answers are read even when sends are late
        await _drain(tasks, stop, drain_s)
    finally:
        left = list(tasks)
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)
    return Run(
        samples=samples,
        began_s=began_s,
        ended_s=clock(),
        cpu_s=time.process_time() - cpu_s,
        stopped=stop.is_set(),
    )


async def _drain(tasks: set[asyncio.Task[None]], stop: asyncio.Event, drain_s: float) -> None:
    """Until all have ended, `stop` is set, or the time is over."""
    if not tasks or stop.is_set():
        return
    stopping = asyncio.ensure_future(stop.wait())
    rest = asyncio.ensure_future(asyncio.wait(set(tasks)))
    try:
        await asyncio.wait({stopping, rest}, timeout=drain_s, return_when=asyncio.FIRST_COMPLETED)
    finally:
        stopping.cancel()
        rest.cancel()


async def _follow(
    stream: Stream, request: pb.GenerateRequest, sample: Sample, clock: Callable[[], float]
) -> None:
    """One request to its end, however it ends."""
    sample.sent_s = clock()
    sample.error = UNFINISHED
    try:
        async for message in stream(request):
            count = len(message.token_ids)
            if not count:
                continue
            now_s = clock()
            if sample.tokens:
                sample.gaps_s.append(now_s - sample.last_s)
            else:
                sample.first_s = now_s
            sample.last_s = now_s
            sample.tokens += count
        sample.error = "" if sample.tokens >= request.max_tokens else INCOMPLETE
    except PhasewiseError as error:
        sample.error, sample.reason = type(error).__name__, str(error)
    finally:
        sample.ended_s = clock()
