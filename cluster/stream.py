"""One request's tokens on their way from a worker to its client.

Promises: exactly one end, a finish reason or a typed error; whoever ends the stream first wins
and later ends are ignored. Tokens that the client has not read are handed over together, so a
client that falls behind gets fewer and larger pieces, up to a bound on what may be unread.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence

from ..engine.detokenizer import StopStrings, TokenText
from ..engine.errors import Cancelled, Overloaded, PhasewiseError
from ..engine.request import FinishReason, Request, TokenLogprobs
from .output import Output, Timings, Usage

MAX_UNREAD_TOKENS = 16384


class TokenStream:
    """What one request has produced. Owned by the router, read by one client."""

    def __init__(
        self,
        request: Request,
        *,
        client_id: str,
        index: int,
        text: TokenText | None,
        wake: asyncio.Event,
        clock: Callable[[], float],
        max_unread_tokens: int = MAX_UNREAD_TOKENS,
    ) -> None:
        self.request = request
        self.client_id = client_id
        self.index = index
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.error: PhasewiseError | None = None
        self.finish_reason: FinishReason | None = None
        self.token_ids: list[int] = []
        self.workers: list[str] = []
        self.queue_s = self.prefill_s = self.transfer_s = 0.0
        self.failovers = self.preemptions = 0
        self.cached_tokens: int | None = None  # of the prompt; not known yet
        self.local_prefill = False
        self.first_s: float | None = None
        self.last_s = self.end_s = 0.0
        self._text = text
        self._stops = StopStrings(request.sampling.stop) if request.sampling.stop else None
        self._wake = wake
        self._clock = clock
        self._max_unread_tokens = max_unread_tokens
        self._num_taken = 0
        self._pieces: list[str] = []
        self._logprobs: list[TokenLogprobs] = []
        self._closed = False  # the client has seen the end

    @property
    def has_ended(self) -> bool:
        return self.ended.done()

    @property
    def is_complete(self) -> bool:
        """Whether the known tokens end the stream by length, whatever the worker says."""
        return len(self.token_ids) >= self.request.sampling.max_tokens

    def push(self, token_id: int, logprobs: TokenLogprobs | None = None) -> None:
        """Take the next token. After the end it is ignored: an abort was already on its way."""
        if self.ended.done():
            return
        self.last_s = self._clock()
        if self.first_s is None:
            self.first_s = self.last_s
        self.token_ids.append(token_id)
        if logprobs is not None:
            self._logprobs.append(logprobs)
        if self._text is not None:
            self._push_text(self._text.push(token_id))
        unread = len(self.token_ids) - self._num_taken
        if unread > self._max_unread_tokens:
            self.fail(Overloaded(f"{unread} tokens wait for the client to read", retry_after_s=1.0))
        self._wake.set()

    def _push_text(self, piece: str) -> None:
        if self._stops is None or len(self.token_ids) <= self.request.sampling.min_tokens:
            self._pieces.append(piece)
        else:
            self._pieces.append(self._stops.push(piece))
            if self._stops.found is not None:
                self._end(FinishReason.STOP, None)

    def finish(self, reason: FinishReason) -> None:
        """End well. Text that was held back is given out."""
        if not self.ended.done():
            if self._text is not None:
                self._push_text(self._text.flush())
            if self._stops is not None:
                self._pieces.append(self._stops.flush())
            self._end(reason, None)

    def fail(self, error: PhasewiseError) -> None:
        if not self.ended.done():
            self._end(None, error)

    def _end(self, reason: FinishReason | None, error: PhasewiseError | None) -> None:
        if self.ended.done():  # the last flush completed a stop string
            return
        self.finish_reason, self.error = reason, error
        self.end_s = self._clock()
        self.ended.set_result(None)
        self._wake.set()

    def take(self) -> Output | None:
        """All that is unread, None if nothing is. Raises the stream's error after its tokens."""
        token_ids = tuple(self.token_ids[self._num_taken :])
        last = self.finish_reason is not None and not self._closed
        if not token_ids and not last:
            if self.error is not None:
                raise self.error
            return None
        if self.error is not None:
            self._wake.set()  # come again for the error
        self._closed = last
        self._num_taken += len(token_ids)
        text = "".join(self._pieces)
        logprobs = tuple(self._logprobs)
        self._pieces.clear()
        self._logprobs.clear()
        return Output(
            request_id=self.client_id,
            index=self.index,
            token_ids=token_ids,
            text=text,
            logprobs=logprobs,
            finish_reason=str(self.finish_reason) if last else None,
            usage=self.usage() if last else None,
            timings=self.timings() if last else None,
        )

    def usage(self) -> Usage:
        return Usage(
            prompt_tokens=self.request.num_prompt_tokens,
            completion_tokens=len(self.token_ids),
            cached_tokens=self.cached_tokens or 0,
        )

    def timings(self) -> Timings:
        """Of an ended stream, on the gateway's clock and, for what workers did, on theirs."""
        first_s = self.end_s if self.first_s is None else self.first_s
        return Timings(
            queue_ms=self.queue_s * 1e3,
            prefill_ms=self.prefill_s * 1e3,
            transfer_ms=self.transfer_s * 1e3,
            ttft_ms=(first_s - self.request.arrival_s) * 1e3,
            tpot_ms=(self.last_s - first_s) * 1e3 / max(1, len(self.token_ids) - 1),
            e2e_ms=(self.end_s - self.request.arrival_s) * 1e3,
            workers=tuple(self.workers),
            failovers=self.failovers,
            preemptions=self.preemptions,
            local_prefill=self.local_prefill,
        )


class Generation:
    """What a client asked for: one stream, or `n` of them, ended together when one fails."""

    def __init__(self, client_id: str, streams: Sequence[TokenStream], wake: asyncio.Event) -> None:
        self.client_id = client_id
        self.streams = tuple(streams)
        self._wake = wake

    async def outputs(self) -> AsyncIterator[Output]:
        """Pieces of all streams until each has ended; raises the first error. Leaving the
        iteration early cancels what still runs."""
        live = list(self.streams)
        try:
            while live:
                await self._wake.wait()
                self._wake.clear()
                for stream in tuple(live):
                    output = stream.take()
                    if output is None:
                        continue
                    if output.finish_reason is not None:
                        live.remove(stream)
                    yield output
        finally:
            self.cancel("the client stopped reading")

    def cancel(self, reason: str) -> None:
        for stream in self.streams:
            stream.fail(Cancelled(reason))
