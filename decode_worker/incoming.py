"""The KV of prompts on its way in, between a grant and the first decoded token.

Three things meet here in any order: the grant (pushed while prefill computes, or fetched once
there is room), the KV's commit, and the gateway's word to go on. Of a prompt whose beginning is
here already only the rest is granted. Runs on the worker's loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

from ..engine.prefix import unpack_hashes
from ..engine.request import TransferAddress
from ..engine.sequence import Sequence
from ..kv_transfer.digest import token_digest
from ..kv_transfer.events import Asked, Ended, Outcome, PeerRefused, PeerUnavailable, Released
from ..kv_transfer.ranked import Endpoint
from .scheduler import DecodeScheduler


@dataclass(slots=True)
class Incoming:
    """A handed-over sequence whose KV is not here yet."""

    sequence: Sequence
    lease: int
    source: TransferAddress
    since_s: float
    digest: int  # of the tokens whose KV it is; made while that is on its way
    fetch: asyncio.Task[None] | None = None


@dataclass(slots=True)
class Arrivals:
    """What became of transfers: sequences whose KV is here, and those whose KV is lost."""

    ready: list[tuple[Sequence, float]] = field(default_factory=list)  # seconds since the resume
    lost: list[tuple[Sequence, str]] = field(default_factory=list)


class Inbox:
    """All transfers into a decode worker."""

    def __init__(
        self,
        scheduler: DecodeScheduler,
        kv: Endpoint,
        *,
        block_size: int,
        orphan_s: float,
        clock: Callable[[], float],
    ) -> None:
        self.scheduler = scheduler
        self.kv = kv
        self.block_size = block_size
        self.orphan_s = orphan_s  # committed KV that nobody resumes is dropped after this
        self.clock = clock
        self.news = Arrivals()
        self._granted: set[int] = set()
        self._refused: set[int] = set()  # given up here, not ended: the commit may be under way
        self._committed: dict[int, tuple[Ended, float]] = {}
        self._incoming: dict[int, Incoming] = {}
        self._lease_of: dict[str, int] = {}  # by sequence id
        self._prefixes: dict[int, list[int]] = {}  # of grants: what was here already, by lease

    def __len__(self) -> int:
        return len(self._granted) + len(self._committed) + len(self._incoming)

    def asked(self, event: Asked) -> None:
        """A prefill worker starts a prompt: give it blocks if there is room."""
        room = self.scheduler.lease_behind(event.num_blocks, unpack_hashes(event.names))
        if room is None:
            self.kv.answer(event, None)
            return
        here, blocks = room
        if self.kv.answer(event, blocks, len(here)):
            self._granted.add(event.lease)
            self._prefixes[event.lease] = here
        else:
            self.scheduler.unlease(blocks)
            self.scheduler.unhold(here)

    def resume(
        self, sequence: Sequence, *, lease: int, granted: bool, source: TransferAddress
    ) -> None:
        """The gateway's word to go on with `sequence`, whose first token it has delivered."""
        now_s = self.clock()
        if lease in self._committed:
            ended, _ = self._committed.pop(lease)
            self._admit(sequence, ended, _known_digest(sequence), since_s=now_s)
        elif lease in self._granted:
            self._expect(Incoming(sequence, lease, source, now_s, _known_digest(sequence)))
        elif granted:
            self.news.lost.append((sequence, "the KV's transfer ended before it was resumed"))
        else:
            self._expect(Incoming(sequence, lease, source, now_s, _known_digest(sequence)))
            self.scheduler.wait_for_room(sequence, now_s)

    def refuse(self, lease: int, source: TransferAddress) -> None:
        """Nobody will use this KV: give it up wherever it is."""
        if lease in self._committed:
            self._drop_committed(lease)
        elif lease in self._granted:
            self._refused.add(lease)
            self.kv.abort(lease)
        else:
            self.kv.discard(source, lease)

    def fetch(self) -> None:
        """Grant blocks to the parked sequences that there is room for now."""
        for sequence, blocks in self.scheduler.next_fetches(self.clock()):
            incoming = self._incoming[self._lease_of[sequence.id]]
            self._granted.add(incoming.lease)
            incoming.fetch = asyncio.create_task(self._fetch(incoming, blocks))

    def ended(self, event: Ended) -> None:
        """A lease's terminal event."""
        self._granted.discard(event.lease)
        incoming = self._forget(event.lease)
        refused = event.lease in self._refused
        self._refused.discard(event.lease)
        if event.outcome is Outcome.COMMITTED:
            if incoming is None:
                self._committed[event.lease] = (event, self.clock())
                if refused:
                    self._drop_committed(event.lease)
            else:
                self._admit(incoming.sequence, event, incoming.digest, since_s=incoming.since_s)
            return
        self._unhold(event.lease)
        if incoming is not None:
            self._lose(incoming.sequence, f"the KV was {event.outcome}: {event.reason}")

    def released(self, event: Released) -> None:
        """Nobody can write to the blocks of a lease that failed."""
        self.scheduler.unlease(list(event.blocks))

    def abort(self, sequence_id: str) -> bool:
        """Give up a sequence whose KV is not here yet, on both sides. False: not one of these."""
        lease = self._lease_of.get(sequence_id)
        if lease is None:
            return False
        incoming = self._forget(lease)
        assert incoming is not None
        self.scheduler.abort(sequence_id)
        self.refuse(lease, incoming.source)
        return True

    def sweep(self) -> None:
        """Drop committed KV that no gateway asked for: its gateway or its request is gone."""
        limit_s = self.clock() - self.orphan_s
        for lease in [key for key, (_, since_s) in self._committed.items() if since_s < limit_s]:
            self._drop_committed(lease)

    def _drop_committed(self, lease: int) -> None:
        ended, _ = self._committed.pop(lease)
        self.scheduler.unlease(list(ended.blocks))
        self._unhold(lease)

    def _unhold(self, lease: int) -> None:
        """The prefix of a push that will not be resumed."""
        self.scheduler.unhold(self._prefixes.pop(lease, []))

    def _expect(self, incoming: Incoming) -> None:
        self._incoming[incoming.lease] = incoming
        self._lease_of[incoming.sequence.id] = incoming.lease

    def _forget(self, lease: int) -> Incoming | None:
        incoming = self._incoming.pop(lease, None)
        if incoming is not None:
            del self._lease_of[incoming.sequence.id]
        return incoming

    def _admit(self, sequence: Sequence, ended: Ended, digest: int, *, since_s: float) -> None:
        pushed_behind = self._prefixes.pop(ended.lease, [])
        if ended.digest != digest or self._fault(sequence, ended, pushed_behind):
            self.scheduler.unlease(list(ended.blocks))
            self.scheduler.unhold(pushed_behind)
            self._lose(sequence, "the KV that came is not this request's")
            return
        now_s = self.clock()
        sequence.blocks = pushed_behind or sequence.blocks
        self.scheduler.resume(sequence, list(ended.blocks), now_s)
        self.news.ready.append((sequence, now_s - since_s))

    def _fault(self, sequence: Sequence, ended: Ended, pushed_behind: list[int]) -> bool:
        """Whether the KV is of another number of tokens, or was put behind others' blocks."""
        if ended.num_tokens != sequence.num_tokens - 1:
            return True
        prefix = self.scheduler.prefix
        names = prefix.shareable(sequence, ended.num_tokens)[: len(pushed_behind)]
        return bool(pushed_behind) and prefix.allocator.lookup(names) != pushed_behind

    def _lose(self, sequence: Sequence, reason: str) -> None:
        self.scheduler.abort(sequence.id)
        self.news.lost.append((sequence, reason))

    async def _fetch(self, incoming: Incoming, blocks: list[int]) -> None:
        try:
            source, lease, skip = incoming.source, incoming.lease, len(incoming.sequence.blocks)
            await self.kv.grant(source, lease, blocks, incoming.digest, skip)
        except (PeerUnavailable, PeerRefused) as error:
            self._granted.discard(incoming.lease)
            self._refused.discard(incoming.lease)
            self.scheduler.unlease(blocks)
            self.kv.discard(incoming.source, incoming.lease)
            if self._forget(incoming.lease) is not None:
                self._lose(incoming.sequence, str(error))


def _known_digest(sequence: Sequence) -> int:
    """Of the tokens whose KV prefill computed: all but the first token that it sampled."""
    assert sequence.tokens is not None
    return token_digest(sequence.tokens[:-1])
