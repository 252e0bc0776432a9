"""The worker's end of one gateway's stream: slots, and one growing message of what is unsent."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from ..engine.prefix import PrefixIndex
from ..engine.report import Failed, FailureCode, Finished
from ..engine.request import Handoff, TokenLogprobs
from .proto import worker_pb2 as pb
from .wire import address_to_pb, logprobs_to_pb

_CODES = {
    FailureCode.INVALID: pb.Failed.INVALID,
    FailureCode.OVERLOADED: pb.Failed.OVERLOADED,
    FailureCode.UNAVAILABLE: pb.Failed.UNAVAILABLE,
    FailureCode.CANCELLED: pb.Failed.CANCELLED,
    FailureCode.DEADLINE: pb.Failed.DEADLINE,
    FailureCode.INTERNAL: pb.Failed.INTERNAL,
}


class Attachment:
    """One gateway. What it has not read yet grows in one message, so that a slow gateway gets
    fewer and larger ones; its size is bounded by the tokens of the gateway's own requests."""

    def __init__(self) -> None:
        self.ids: dict[int, str] = {}  # open slots -> sequence ids
        self._cursor = -1  # how far it knows the prefix cache
        self._unsent = pb.FromWorker()
        self._slots: list[int] = []  # its columns of tokens: they fill lists faster
        self._token_ids: list[int] = []
        self._wake = asyncio.Event()
        self._closed = False

    def token(self, slot: int, token_id: int, logprobs: TokenLogprobs | None) -> None:
        self._slots.append(slot)
        self._token_ids.append(token_id)
        if logprobs is not None:
            self._unsent.logprobs.append(logprobs_to_pb(slot, logprobs))

    def handoff(self, slot: int, handoff: Handoff) -> None:
        logprobs = handoff.first_logprobs
        self._unsent.handoffs.append(
            pb.Handoff(
                slot=slot,
                first_token=handoff.first_token,
                lease=handoff.lease,
                granted=handoff.granted,
                source=address_to_pb(handoff.source),
                queue_s=handoff.queue_s,
                prefill_s=handoff.prefill_s,
                cached_tokens=handoff.cached_tokens,
                logprobs=None if logprobs is None else logprobs_to_pb(slot, logprobs),
            )
        )

    def finished(self, slot: int, finished: Finished) -> None:
        self._unsent.finished.append(
            pb.Finished(
                slot=slot,
                reason=finished.reason,
                queue_s=finished.queue_s,
                prefill_s=finished.prefill_s,
                transfer_s=finished.transfer_s,
                preemptions=finished.preemptions,
                cached_tokens=finished.cached_tokens,
            )
        )

    def failed(self, slot: int, failed: Failed) -> None:
        self._unsent.failed.append(
            pb.Failed(
                slot=slot,
                code=_CODES[failed.code],
                reason=failed.reason,
                retry_after_s=failed.retry_after_s,
            )
        )

    def prefixes(self, index: PrefixIndex) -> None:
        """Tell what the prefix cache gained and lost, unless the last such news is unsent."""
        if self._unsent.HasField("prefixes"):
            return
        news = index.news(self._cursor)
        self._cursor = news.cursor
        if news.reset or news.added or news.removed:
            self._unsent.prefixes.reset = news.reset
            self._unsent.prefixes.added.extend(news.added)
            self._unsent.prefixes.removed.extend(news.removed)

    def flush(self, load: pb.Load) -> None:
        """Send what is unsent, with the worker's load; the load alone is a heartbeat."""
        self._unsent.load.CopyFrom(load)
        self._wake.set()

    def close(self) -> None:
        """The gateway will send nothing more."""
        self._closed = True
        self._wake.set()

    async def messages(self) -> AsyncIterator[pb.FromWorker]:
        """What to send, until the gateway has closed its side."""
        while True:
            await self._wake.wait()
            if self._closed:
                return
            self._wake.clear()
            message, self._unsent = self._unsent, pb.FromWorker()
            message.slots.extend(self._slots)
            message.token_ids.extend(self._token_ids)
            self._slots.clear()
            self._token_ids.clear()
            yield message
