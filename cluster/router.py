"""Disaggregation: prefill here, decode there, and on from where it stopped when a worker dies.

Promises: one owner a request; exactly one end, by its deadline at the latest; a request that ends
early is aborted at once where it runs; what a lost worker was serving goes on elsewhere from the
last token that was delivered, or ends as unavailable at once. Knows workers only by their links.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Literal

from ..engine.errors import (
    DeadlineExceeded,
    InvalidRequest,
    Overloaded,
    PhasewiseError,
    Unavailable,
)
from ..engine.prefix import extend_hashes
from ..engine.request import FinishReason, Request
from ..engine.routing import LeastOutstandingTokens, Policy, PrefixAware
from . import wire
from .admission import Admitted
from .fleet import BlockNames, Fleet, Worker
from .metrics import Metrics
from .proto import worker_pb2 as pb
from .served_model import ServedModel
from .stream import Generation, TokenStream
from .worker_link import Lost, Outcome, Slot, WorkerLink

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class RouterLimits:
    local_prefill: Literal["never", "auto", "always"] = "auto"
    local_prefill_tokens: int = 0  # auto: prompts up to this length skip the hop
    max_in_flight: int = 1024  # streams
    max_failovers: int = 3  # 0: a lost worker ends its requests
    timeout_s: float = 600.0  # of a request that names none


@dataclass(frozen=True, slots=True)
class Route:
    """Where an attempt goes. `prefill` None: the decode worker computes the prompt itself."""

    prefill: Worker | None
    decode: Worker
    names: BlockNames  # for policies that look at caches


class Router:
    """Owns every request from admission to its end."""

    def __init__(
        self,
        fleet: Fleet,
        served: ServedModel,
        limits: RouterLimits,
        metrics: Metrics,
        clock: Callable[[], float],
        *,
        prefill_policy: Policy | None = None,
        decode_policy: Policy | None = None,
    ) -> None:
        self.fleet = fleet
        self.limits = limits
        self.draining = False
        self._served = served
        self._metrics = metrics
        self._clock = clock
        self._prefill_policy = prefill_policy or LeastOutstandingTokens()
        self._decode_policy = decode_policy or LeastOutstandingTokens()
        self._live: dict[str, Generation] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._serial = itertools.count()

    @property
    def in_flight(self) -> int:
        """Streams whose workers have not all let go."""
        return len(self._tasks)

    def can_serve(self) -> bool:
        """Whether some set of ready workers can serve a request from prompt to end."""
        prefill = self.limits.local_prefill != "never" or bool(self.fleet.ready("prefill"))
        return not self.draining and prefill and bool(self.fleet.ready("decode"))

    def start(self, admitted: Admitted) -> Generation:
        """Begin a request. Raises Unavailable, Overloaded, or InvalidRequest for a live id."""
        if self.draining:
            raise Unavailable("the service is shutting down", retry_after_s=5.0)
        if admitted.id in self._live:
            raise InvalidRequest(
                "request_id",
                f"{admitted.id!r} is in use by a request that has not ended",
                "choose another, or leave it out",
            )
        if self.in_flight + admitted.n > self.limits.max_in_flight:
            raise Overloaded(f"{self.in_flight} requests are in flight", retry_after_s=1.0)
        wake = asyncio.Event()
        streams = [
            TokenStream(
                request,
                client_id=admitted.id,
                index=index,
                text=self._served.token_text(admitted.token_ids),
                wake=wake,
                clock=self._clock,
            )
            for index, request in enumerate(admitted.requests())
        ]
        generation = Generation(admitted.id, streams, wake)
        self._live[admitted.id] = generation
        deadline_s = admitted.arrival_s + (admitted.timeout_s or self.limits.timeout_s)
        for stream in streams:
            task = asyncio.create_task(self._own(stream, generation, deadline_s))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        return generation

    def abort(self, client_id: str) -> bool:
        """End a live request as cancelled; False if there is none."""
        generation = self._live.get(client_id)
        if generation is not None:
            generation.cancel("aborted")
        return generation is not None

    async def drain(self, timeout_s: float) -> int:
        """Take nothing new and let what runs finish; returns how many were cut off."""
        self.draining = True
        self.fleet.changed.set()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=timeout_s)
        unfinished = [s for g in self._live.values() for s in g.streams if not s.has_ended]
        for stream in unfinished:
            stream.fail(Unavailable("the service is shutting down", retry_after_s=5.0))
        return len(unfinished)

    async def _own(self, stream: TokenStream, generation: Generation, deadline_s: float) -> None:
        """One stream from start to end, and on until its workers have let go of it."""
        late = DeadlineExceeded(f"request {stream.client_id} passed its deadline")
        timer = asyncio.get_running_loop().call_later(
            max(0.0, deadline_s - self._clock()), stream.fail, late
        )
        stream.ended.add_done_callback(lambda _: self._end(stream, generation))
        try:
            await self._serve(stream, deadline_s)
        except Exception as error:  # a bug here must not leave a client waiting
            log.exception("request %s", stream.client_id)
            stream.fail(PhasewiseError(f"internal error: {error!r}"))
        finally:
            timer.cancel()

    def _end(self, stream: TokenStream, generation: Generation) -> None:
        outcome = stream.finish_reason or type(stream.error).__name__
        self._metrics.count_end(str(outcome), stream.usage(), stream.timings())
        if all(s.has_ended for s in generation.streams):
            self._live.pop(generation.client_id, None)

    async def _serve(self, stream: TokenStream, deadline_s: float) -> None:
        """Attempts until the stream has ended. A worker that failed is left out of the next
        attempt where another is ready."""
        avoid: set[str] = set()
        error: PhasewiseError | None = None
        for attempt in range(self.limits.max_failovers + 1):
            if attempt:
                stream.failovers += 1
                self._metrics.count_failover(type(error).__name__)
            request = self._request(stream, attempt)
            try:
                route = self._pick(request, avoid, error)
            except PhasewiseError as nobody:
                stream.fail(error or nobody)
                return
            outcome = await self._attempt(stream, request, route, deadline_s)
            if stream.has_ended:
                return
            if isinstance(outcome, pb.Finished):
                _finish(stream, outcome)
                return
            at_fault = _at_fault(outcome, stream)
            error = _error(outcome, at_fault)
            if not isinstance(error, (Unavailable, Overloaded)):
                break
            if self._has_all_tokens(stream):
                return
            avoid.add(at_fault)
        stream.fail(error or Unavailable("no attempt was made"))

    def _request(self, stream: TokenStream, attempt: int) -> Request:
        """The stream's request with what was delivered behind the prompt, under a name that no
        worker has met: an attempt that was given up may still be ending somewhere."""
        return replace(
            stream.request,
            id=f"{stream.client_id}/{stream.index}/{attempt}-{next(self._serial)}",
            token_ids=stream.request.token_ids + tuple(stream.token_ids),
        )

    def _pick(self, request: Request, avoid: set[str], error: PhasewiseError | None) -> Route:
        """Raises Unavailable when no ready workers can serve, and the last worker's Overloaded
        when there is no other."""
        names = self._names(request)
        decode = self._choose("decode", self._decode_policy, request, names, avoid, error)
        if self._prefills_locally(request, names, decode):
            return Route(None, decode, names)
        prefill = self._choose("prefill", self._prefill_policy, request, names, avoid, error)
        return Route(prefill, decode, names)

    def _names(self, request: Request) -> BlockNames:
        """Of the full blocks of a prompt, where a policy asks who has them."""
        if not isinstance(self._prefill_policy, PrefixAware):
            return {}
        sizes = set()
        for worker in (*self.fleet.ready("prefill"), *self.fleet.ready("decode")):
            description = worker.link.description if worker.link is not None else None
            if description is not None and description.prefix_cache:
                sizes.add(description.block_size)
        tokens, salt = request.token_ids, request.cache_salt
        return {size: extend_hashes([], tokens, size, salt) for size in sizes}

    def _prefills_locally(self, request: Request, names: BlockNames, decode: Worker) -> bool:
        mode = self.limits.local_prefill
        if mode != "auto":
            return mode == "always"
        cause = ""
        if request.num_tokens <= self.limits.local_prefill_tokens:
            cause = "short"
        elif not self.fleet.ready("prefill"):
            cause = "no_prefill_worker"
        elif names:
            left = request.num_tokens - decode.view(names).cached_tokens
            cause = "cached" if left <= self.limits.local_prefill_tokens else ""
        if cause:
            self._metrics.count_local_prefill(cause)
        return bool(cause)

    def _choose(
        self,
        role: str,
        policy: Policy,
        request: Request,
        names: BlockNames,
        avoid: set[str],
        error: PhasewiseError | None = None,
    ) -> Worker:
        ready = self.fleet.ready(role)
        if not ready:
            raise Unavailable(f"no {role} worker is ready")
        fresh = [worker for worker in ready if worker.peer not in avoid]
        if not fresh and isinstance(error, Overloaded):
            raise error
        candidates = fresh or ready
        return candidates[policy.choose([w.view(names) for w in candidates], request.num_tokens)]

    async def _attempt(
        self, stream: TokenStream, request: Request, route: Route, deadline_s: float
    ) -> Outcome:
        """Prefill, hand over, decode. A stream that ends on the way still goes through each
        step that holds something on a worker, so that it is aborted there."""
        message = wire.request_to_pb(request, now_s=self._clock(), deadline_s=deadline_s)
        num_tokens = request.num_tokens
        with ExitStack() as held:
            held.enter_context(route.decode.holding(num_tokens))
            stream.local_prefill = route.prefill is None
            if route.prefill is None:
                return await self._run(
                    route.decode, stream, lambda link: link.submit(stream, message, None)
                )
            target, receiver = _transfer_address(route.decode), route.decode.peer
            with route.prefill.holding(num_tokens):
                handoff = await self._run(
                    route.prefill, stream, lambda link: link.submit(stream, message, target)
                )
            if not isinstance(handoff, pb.Handoff):
                return handoff
            self._take_first(stream, handoff)
            decode = self._receiver(request, route, handoff, receiver)
            if decode is None:
                return Lost(reason="it left before the handoff", worker=receiver)
            if decode is not route.decode:
                held.enter_context(decode.holding(num_tokens))
            return await self._run(
                decode, stream, lambda link: link.resume(stream, message, handoff)
            )

    def _take_first(self, stream: TokenStream, handoff: pb.Handoff) -> None:
        """TTFT never waits for the KV transfer."""
        stream.queue_s, stream.prefill_s = handoff.queue_s, handoff.prefill_s
        _note_cached(stream, handoff)
        beside = handoff.logprobs if handoff.HasField("logprobs") else None
        stream.push(handoff.first_token, None if beside is None else wire.logprobs_from_pb(beside))
        if stream.is_complete:
            stream.finish(FinishReason.LENGTH)

    def _receiver(
        self, request: Request, route: Route, handoff: pb.Handoff, asked: str
    ) -> Worker | None:
        """Who decodes: the worker that granted blocks, as the incarnation that was `asked` to, or
        whoever is best now. None: nobody can, and the KV, if any is left, ends with its lease."""
        if handoff.granted:
            is_there = route.decode.state in ("ready", "draining") and route.decode.peer == asked
            return route.decode if is_there else None
        try:
            return self._choose("decode", self._decode_policy, request, route.names, set())
        except Unavailable:
            return None

    async def _run(
        self, worker: Worker, stream: TokenStream, open_slot: Callable[[WorkerLink], Slot]
    ) -> Outcome:
        """One slot from opening to outcome, aborted as soon as the stream has ended."""
        link = worker.link
        assert link is not None, "a worker that was chosen has a link"
        stream.workers.append(str(link.worker))
        try:
            slot = open_slot(link)
        except Unavailable as error:
            return Lost(reason=str(error))

        def abort(_: asyncio.Future[None]) -> None:
            link.abort(slot)

        stream.ended.add_done_callback(abort)
        try:
            return await slot.outcome
        finally:
            stream.ended.remove_done_callback(abort)

    def _has_all_tokens(self, stream: TokenStream) -> bool:
        """A worker may die between the last token and saying so."""
        sampling = stream.request.sampling
        if stream.is_complete:
            stream.finish(FinishReason.LENGTH)
        elif len(stream.token_ids) >= max(1, sampling.min_tokens):
            last = stream.token_ids[-1]
            eos = last in self._served.eos_token_ids and not sampling.ignore_eos
            if eos or last in sampling.stop_token_ids:
                stream.finish(FinishReason.STOP)
        return stream.has_ended


def _transfer_address(worker: Worker) -> pb.TransferAddress:
    assert worker.link is not None, "a worker that was chosen has a link"
    return worker.link.description.transfer


def _note_cached(stream: TokenStream, said: pb.Handoff | pb.Finished) -> None:
    """Of the client's own prompt, by the first worker that computed it."""
    if stream.cached_tokens is None:
        stream.cached_tokens = min(said.cached_tokens, stream.request.num_prompt_tokens)


def _finish(stream: TokenStream, finished: pb.Finished) -> None:
    if stream.local_prefill:
        stream.queue_s, stream.prefill_s = finished.queue_s, finished.prefill_s
        _note_cached(stream, finished)
    stream.transfer_s = finished.transfer_s
    stream.preemptions += finished.preemptions
    stream.finish(FinishReason(finished.reason))


def _at_fault(outcome: Outcome, stream: TokenStream) -> str:
    """Whose failure an attempt's was."""
    lost = outcome.worker if isinstance(outcome, Lost) else ""
    return lost or stream.workers[-1]


def _error(outcome: Outcome, worker: str) -> PhasewiseError:
    """What a client is told when a worker's word is the last one."""
    if isinstance(outcome, Lost):
        return Unavailable(f"{worker} was lost: {outcome.reason}")
    if not isinstance(outcome, pb.Failed):
        return PhasewiseError(f"{worker} answered with {type(outcome).__name__} out of turn")
    reason, delay_s = f"{worker}: {outcome.reason}", outcome.retry_after_s or 1.0
    if outcome.code == pb.Failed.INVALID:
        return InvalidRequest("request", reason, "change the request")
    if outcome.code == pb.Failed.OVERLOADED:
        return Overloaded(reason, retry_after_s=delay_s)
    if outcome.code == pb.Failed.UNAVAILABLE:
        return Unavailable(reason, retry_after_s=delay_s)
    if outcome.code == pb.Failed.DEADLINE:
        return DeadlineExceeded(reason)
    return PhasewiseError(reason)
