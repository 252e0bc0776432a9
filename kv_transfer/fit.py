"""How the pools of two ranks fit: what each sends the other, and the legs of a lease. Pure.

A lease between workers that are split alike is one transfer a rank, under the lease's own id.
Otherwise a rank may have several counterparts; what it exchanges with each is a leg of the lease,
a lease of its own in the protocol, whose id both sides know.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from ..engine.layout import KVLayout
from ..engine.request import TransferAddress
from ..engine.shard_plan import Shard
from .events import PeerRefused
from .layout_map import Part, Route, check_layouts, routes, windows
from .lease import Extent
from .window import Window

LEG_BITS = 8  # of a lease's id, zero in the lease's own
LEG_MASK = (1 << LEG_BITS) - 1
Holds = tuple[int, int, int, int]  # layers from, up to; KV heads from, up to; of the whole model
Pairing = dict[tuple[int, int], int]  # (source's rank, target's rank) -> leg


@dataclass(frozen=True, kw_only=True, slots=True)
class Held:
    """What the ranks of a worker hold, and which of them this is."""

    rank: int
    parts: tuple[Part, ...]

    @property
    def own(self) -> Part:
        return self.parts[self.rank]

    @property
    def holds(self) -> tuple[Holds, ...]:
        """Every rank's."""
        return tuple(holds_of(part) for part in self.parts)


@dataclass(frozen=True, kw_only=True, eq=False)
class Way:
    """One direction of a pair: the windows of this pool and of the peer's. Without layers where
    nothing is sent that way."""

    mine: Window
    theirs: Window

    @cached_property
    def is_plain(self) -> bool:
        """Blocks go as they are."""
        return self.mine.is_whole and self.theirs.is_whole

    @cached_property
    def extent(self) -> Extent:
        """As this side's lease table counts."""
        mine = self.mine
        return Extent(
            num_layers=len(mine.layers),
            unit_bytes=mine.unit_bytes,
            mine=mine.per_block,
            theirs=self.theirs.per_block,
            step=mine.step,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Fit:
    """One rank and one of a peer worker's."""

    out: Way
    into: Way
    legs_out: tuple[int, ...]  # of a lease that this rank sends to the peer's worker
    legs_in: tuple[int, ...]
    idle: frozenset[int]  # ranks of this worker that send that worker nothing


def whole(layout: KVLayout) -> Held:
    """A worker of one rank."""
    layers, heads = range(layout.num_layers), range(layout.num_kv_heads)
    return Held(rank=0, parts=(Part(rank=0, layers=layers, kv_heads=heads, layout=layout),))


def held_by(shards: Sequence[Shard], rank: int, layout: KVLayout) -> Held:
    """`layout` is the pool of `rank`."""
    holds = [
        (shard.layers.start, shard.layers.stop, shard.kv_heads.start, shard.kv_heads.stop)
        for shard in shards
    ]
    return held(rank, holds, layout)


def held(rank: int, holds: Sequence[Holds], layout: KVLayout) -> Held:
    """From what was said about a worker. Raises ValueError for what no worker holds."""
    if not 0 <= rank < len(holds):
        raise ValueError(f"rank {rank} of {len(holds)}")
    parts = tuple(_part(number, one, layout) for number, one in enumerate(holds))
    if parts[rank].layout != layout:
        raise ValueError(f"rank {rank} holds another pool than its own")
    return Held(rank=rank, parts=parts)


def holds_of(part: Part) -> Holds:
    return part.layers.start, part.layers.stop, part.kv_heads.start, part.kv_heads.stop


def parts_at(peer: TransferAddress, layout: KVLayout) -> tuple[Part, ...]:
    """What a peer's ranks hold, by its address; of their layouts only these counts are true.
    Raises PeerRefused."""
    try:
        return tuple(
            _part(rank, address.holds, layout) for rank, address in enumerate((peer, *peer.ranks))
        )
    except ValueError as error:
        raise PeerRefused(f"{peer.worker} does not say what its ranks hold: {error}") from None


def pairing(sources: Sequence[Part], targets: Sequence[Part]) -> Pairing:
    """Which ranks meet when one worker sends to another, and the leg between each two.

    A leg is 0 where every rank has one counterpart at most. Else no two legs of one rank have
    the same number. Raises PeerRefused.
    """
    return _pairing(routes(sources, targets))


def meet(mine: Held, theirs: Held) -> Fit:
    """Raises PeerRefused, naming what does not fit."""
    check_layouts(mine.own.layout, theirs.own.layout)
    sent, received = routes(mine.parts, theirs.parts), routes(theirs.parts, mine.parts)
    legs_sent, legs_received = _pairing(sent), _pairing(received)
    out, into = _find(sent, mine, theirs), _find(received, theirs, mine)
    return Fit(
        out=Way(mine=out[0], theirs=out[1]),
        into=Way(mine=into[1], theirs=into[0]),
        legs_out=tuple(leg for (source, _), leg in legs_sent.items() if source == mine.rank),
        legs_in=tuple(leg for (_, target), leg in legs_received.items() if target == mine.rank),
        idle=frozenset(range(len(mine.parts))) - {source for source, _ in legs_sent},
    )


def _pairing(found: Sequence[Route]) -> Pairing:
    pairs = [(route.source.rank, route.target.rank) for route in found]
    assert len(set(pairs)) == len(pairs), "two ranks share one range of layers and one of heads"
    sources, targets = (Counter(side) for side in zip(*pairs, strict=True))
    if max(*sources.values(), *targets.values()) == 1:
        return dict.fromkeys(pairs, 0)
    legs = {pair: 1 + sum(pair) for pair in pairs}
    if max(legs.values()) > LEG_MASK:
        raise PeerRefused(f"two workers have {LEG_MASK} ranks together at most; use fewer")
    return legs


def _find(found: Sequence[Route], source: Held, target: Held) -> tuple[Window, Window]:
    for route in found:
        if (route.source.rank, route.target.rank) == (source.rank, target.rank):
            return windows(route)
    nothing = range(source.own.layers.start, source.own.layers.start)
    none = Route(source=source.own, target=target.own, layers=nothing, kv_heads=nothing)
    return windows(none)


def _part(rank: int, holds: Sequence[int], layout: KVLayout) -> Part:
    if len(holds) != 4:
        raise ValueError(f"rank {rank} says nothing")
    first, stop, head, last = holds
    if not (0 <= first < stop and 0 <= head < last):
        raise ValueError(f"rank {rank} holds nothing")
    own = replace(layout, num_layers=stop - first, num_kv_heads=last - head)
    return Part(rank=rank, layers=range(first, stop), kv_heads=range(head, last), layout=own)
