"""The KV of prompts on its way out: asked for, pushed chunk by chunk, or parked for a fetch.

Push: when a prompt's compute starts, decode is asked for blocks while the first layers already
run; a grant sends every chunk layer by layer. Pull: without a grant the whole prompt waits in
this worker's pool until a decode worker fetches it. Blocks that decode holds already are not
sent; those that were found in the prefix cache here are sent at once.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass, field

from ..engine.layout import KVLayout
from ..engine.prefix import extend_hashes, pack_hashes
from ..engine.request import TransferAddress
from ..engine.sequence import Sequence
from ..kv_transfer.digest import token_digest
from ..kv_transfer.events import PeerRefused, PeerUnavailable
from ..kv_transfer.layer_clock import LayerClock, finished_clock
from ..kv_transfer.ranked import Endpoint

log = logging.getLogger(__name__)

MAX_NAMES = 8192  # block names in one ask, 128 KiB
REFUSAL_MEMORY_S = 0.05  # how long `auto` spares a decode worker that had no room


@dataclass(slots=True)
class Outgoing:
    """One prompt's transfer. `asking` is None once answered, or when nobody was asked."""

    lease: int
    sequence: Sequence
    granted: bool = False
    finished: bool = False  # the prompt is computed: committed or parked
    asking: asyncio.Task[None] | None = None
    chunks: list[tuple[list[int], int, LayerClock]] = field(default_factory=list)


class Outbox:
    """All transfers of a prefill worker. Runs on the worker's loop."""

    def __init__(
        self, kv: Endpoint, layout: KVLayout, *, mode: str, clock: Callable[[], float]
    ) -> None:
        self.kv = kv
        self.layout = layout
        self.mode = mode
        self.clock = clock
        self.parked = 0  # prompts that found no room and wait to be fetched, in all
        self._by_id: dict[str, Outgoing] = {}
        self._by_lease: dict[int, Outgoing] = {}
        self._refused_until_s: dict[str, float] = {}

    def __len__(self) -> int:
        return len(self._by_id)

    def begin(
        self, sequence: Sequence, decode: TransferAddress, names: list[int], num_ready: int
    ) -> None:
        """The prompt's first chunk is about to run. `names` are those of its first blocks, which
        decode may hold; the first `num_ready` blocks are complete."""
        outgoing = self._open(sequence)
        if self._worth_asking(decode):
            outgoing.asking = asyncio.create_task(self._ask(outgoing, decode, names))
            if num_ready:
                ready = finished_clock(self.layout.num_layers)
                outgoing.chunks.append((sequence.blocks[:num_ready], 0, ready))

    def chunk(self, sequence: Sequence, start: int, count: int, layers: LayerClock) -> None:
        """Positions `[start, start + count)` are about to be computed, layer after layer."""
        outgoing = self._by_id.get(sequence.id)
        if outgoing is None or not (outgoing.granted or outgoing.asking):
            return
        size = self.layout.block_size
        first, end = start // size, -(-(start + count) // size)
        blocks = sequence.blocks[first:end]
        if outgoing.granted:
            self._push(outgoing, blocks, first, layers)
        else:
            outgoing.chunks.append((blocks, first, layers))

    def finish(self, sequence: Sequence) -> Outgoing:
        """The prompt is computed: commit what was pushed, or park it for a fetch."""
        outgoing = self._by_id[sequence.id]
        num_tokens = sequence.num_computed
        assert sequence.tokens is not None
        digest = token_digest(sequence.tokens[:num_tokens])
        if outgoing.asking is not None:  # the answer is late: it must not hold up the first token
            self.drop(sequence.id)
            outgoing = self._open(sequence)
        outgoing.finished = True
        if outgoing.granted:
            self.kv.commit(outgoing.lease, num_tokens, digest)
        else:
            self.parked += 1
            self.kv.park(outgoing.lease, sequence.blocks, num_tokens, digest)
        return outgoing

    def drop(self, sequence_id: str) -> None:
        """The prompt will not be handed over: what decode granted is given back."""
        outgoing = self._by_id.pop(sequence_id, None)
        if outgoing is None:
            return
        del self._by_lease[outgoing.lease]
        if outgoing.asking is not None:
            outgoing.asking.cancel()
        self.kv.abort(outgoing.lease)

    def ended(self, lease: int) -> Sequence | None:
        """The lease's terminal event: the sequence whose blocks nobody reads any more.

        A lease that ends before its prompt is computed (decode died, say) leaves the prompt to
        be parked: some other decode worker fetches it.
        """
        outgoing = self._by_lease.pop(lease, None)
        if outgoing is None:
            return None
        del self._by_id[outgoing.sequence.id]
        if outgoing.finished:
            return outgoing.sequence
        self._open(outgoing.sequence)
        return None

    def _open(self, sequence: Sequence) -> Outgoing:
        outgoing = Outgoing(lease=self.kv.new_lease(), sequence=sequence)
        self._by_id[sequence.id] = self._by_lease[outgoing.lease] = outgoing
        return outgoing

    def _worth_asking(self, decode: TransferAddress) -> bool:
        if self.mode == "pull":
            return False
        refused_until_s = self._refused_until_s.get(decode.worker.name, 0.0)
        return self.mode == "push" or self.clock() >= refused_until_s

    def _push(self, outgoing: Outgoing, blocks: list[int], first: int, layers: LayerClock) -> None:
        """Blocks `[first, ...)` of the prompt, without those that decode has."""
        missing = first - self.kv.skipped(outgoing.lease)
        if missing + len(blocks) > 0:
            self.kv.push(outgoing.lease, blocks[max(0, -missing) :], max(0, missing), layers)

    def _names_at(self, decode: TransferAddress, sequence: Sequence, names: list[int]) -> list[int]:
        """What decode calls the prompt's first blocks; `names` are this worker's."""
        size = self.kv.block_size(decode)
        if not names or size == self.layout.block_size:
            return names
        assert sequence.tokens is not None, "a prompt's tokens are known"
        known = sequence.tokens[: sequence.num_tokens - 1]  # one at least is computed there
        return extend_hashes([], known, size, sequence.request.cache_salt)

    async def _ask(self, outgoing: Outgoing, decode: TransferAddress, names: list[int]) -> None:
        num_tokens = outgoing.sequence.num_tokens
        num_blocks = self.layout.blocks_for(num_tokens)
        packed = pack_hashes(self._names_at(decode, outgoing.sequence, names)[:MAX_NAMES])
        try:
            outgoing.granted = await self.kv.ask(
                decode, outgoing.lease, num_blocks, packed, num_tokens
            )
        except (PeerUnavailable, PeerRefused) as error:
            log.warning("no push of %s: %s", outgoing.sequence.id, error)
        outgoing.asking = None
        if outgoing.granted:
            for blocks, first, layers in outgoing.chunks:
                self._push(outgoing, blocks, first, layers)
        else:
            self._refused_until_s[decode.worker.name] = self.clock() + REFUSAL_MEMORY_S
            self._rename(outgoing)
        outgoing.chunks.clear()

    def _rename(self, outgoing: Outgoing) -> None:
        """It was asked for in vain, but decode may have granted it: too late, or before the two
        lost each other. What will be parked must not be taken for that."""
        if self._by_lease.pop(outgoing.lease, None) is not None:
            outgoing.lease = self.kv.new_lease()
            self._by_lease[outgoing.lease] = outgoing
