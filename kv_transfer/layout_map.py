"""Which bytes go where when KV moves between pools that are split differently. Pure numbers.

Each rank of a worker holds some layers and some KV heads of every block, its block ids are its
worker's, and one side's block size divides the other's. What two ranks both hold is a `Route`;
`spans` says which bytes of their pools that is, for the blocks of one prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..engine.layout import ITEM_BYTES, KVLayout
from .events import PeerRefused

_SAME = ("head_dim", "dtype", "fingerprint")


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """What one rank's pool holds: `layout` counts these layers and heads."""

    rank: int
    layers: range
    kv_heads: range
    layout: KVLayout

    def __post_init__(self) -> None:
        assert len(self.layers) == self.layout.num_layers, "a pool has its own layers"
        assert len(self.kv_heads) == self.layout.num_kv_heads, "a pool has its own heads"


@dataclass(frozen=True, kw_only=True, slots=True)
class Route:
    """Layers and KV heads that one rank sends to another."""

    source: Part
    target: Part
    layers: range
    kv_heads: range


@dataclass(frozen=True, kw_only=True, slots=True)
class Copy:
    """So many bytes, from an offset of one rank's pool to an offset of another's."""

    source_rank: int
    source_offset: int
    target_rank: int
    target_offset: int
    length: int


def routes(sources: Sequence[Part], targets: Sequence[Part]) -> tuple[Route, ...]:
    """Who sends what to whom, so that every target gets all its layers and heads exactly once.

    A head that several sources hold comes from the one whose turn it is, so that several targets
    do not all ask the same. Raises PeerRefused, naming what does not fit.
    """
    check_layouts(sources[0].layout, targets[0].layout)
    found: list[Route] = []
    for target in targets:
        for layers in _cuts(target.layers, [source.layers for source in sources]):
            holders = [source for source in sources if _covers(source.layers, layers)]
            for heads in _cuts(target.kv_heads, [holder.kv_heads for holder in holders]):
                able = [holder for holder in holders if _covers(holder.kv_heads, heads)]
                if not able:
                    raise PeerRefused(
                        f"KV of layers {layers.start} to {layers.stop - 1}, heads {heads.start} "
                        f"to {heads.stop - 1} is on no rank of the sender; the two workers must "
                        "serve one model"
                    )
                source = able[target.rank % len(able)]
                found.append(Route(source=source, target=target, layers=layers, kv_heads=heads))
    return tuple(found)


def check_layouts(source: KVLayout, target: KVLayout) -> None:
    """Raises PeerRefused for pools between which no KV can move, however they are split."""
    for name in _SAME:
        here, there = getattr(source, name), getattr(target, name)
        if here != there:
            raise PeerRefused(f"{name} is {here!r} on the sender and {there!r} on the receiver")
    small, large = sorted((source.block_size, target.block_size))
    if large % small:
        raise PeerRefused(
            f"block_size {source.block_size} on the sender and {target.block_size} on the "
            "receiver: neither divides the other"
        )


def spans(
    route: Route, source_blocks: Sequence[int], target_blocks: Sequence[int], num_tokens: int
) -> np.ndarray:  # int64 [copies, 3]
    """(offset in the source's pool, in the target's, bytes) of a route's first layer.

    Layer `i` of the route lies `i * layer_bytes` of its own pool further. Blocks are a prompt's,
    in token order, from the same position on both sides. Neighbours on both sides are one copy;
    positions past `num_tokens` move only within the last smaller block.
    """
    source, target = route.source.layout, route.target.layout
    step = min(source.block_size, target.block_size)  # contiguous on both sides
    starts = np.arange(0, num_tokens, step, dtype=np.int64)
    here = _offsets(route.source, route, starts, source_blocks)
    there = _offsets(route.target, route, starts, target_blocks)
    order = np.argsort(here, kind="stable")
    length = step * source.head_dim * ITEM_BYTES[source.dtype]
    return _joined(here[order], there[order], length)


def copies(
    all_routes: Sequence[Route],
    source_blocks: Sequence[int],
    target_blocks: Sequence[int],
    num_tokens: int,
) -> list[Copy]:
    """Every copy of a prompt's KV over all layers and ranks."""
    found = []
    for route in all_routes:
        own = spans(route, source_blocks, target_blocks, num_tokens).tolist()
        source, target = route.source.layout, route.target.layout
        found += [
            Copy(
                source_rank=route.source.rank,
                source_offset=layer * source.layer_bytes + here,
                target_rank=route.target.rank,
                target_offset=layer * target.layer_bytes + there,
                length=length,
            )
            for layer in range(len(route.layers))
            for here, there, length in own
        ]
    return found


def _offsets(
    part: Part, route: Route, starts: np.ndarray, blocks: Sequence[int]
) -> np.ndarray:  # int64 [len(starts) * 2 * heads]
    """Where in `part`'s pool each (position, key or value, head) of the first layer begins."""
    layout = part.layout
    row = layout.head_dim * ITEM_BYTES[layout.dtype]
    head_bytes = layout.block_size * row
    ids = np.asarray(blocks, dtype=np.int64)[starts // layout.block_size]
    assert ids.size == 0 or (ids.min() >= 0 and ids.max() < layout.num_blocks)
    base = ids * layout.block_bytes + starts % layout.block_size * row
    sides = np.arange(2, dtype=np.int64) * layout.num_kv_heads * head_bytes
    first = route.kv_heads.start - part.kv_heads.start
    heads = (first + np.arange(len(route.kv_heads), dtype=np.int64)) * head_bytes
    layer = (route.layers.start - part.layers.start) * layout.layer_bytes
    return (layer + base[:, None, None] + sides[None, :, None] + heads[None, None, :]).reshape(-1)


def _joined(here: np.ndarray, there: np.ndarray, length: int) -> np.ndarray:
    """Copies of `length` bytes each, those that follow one another on both sides made one."""
    if not len(here):
        return np.empty((0, 3), dtype=np.int64)
    follows = (np.diff(here) == length) & (np.diff(there) == length)
    firsts = np.flatnonzero(np.concatenate(([True], ~follows)))
    counts = np.diff(np.append(firsts, len(here)))
    return np.stack((here[firsts], there[firsts], counts * length), axis=1)


def _cuts(whole: range, others: Sequence[range]) -> list[range]:
    """`whole` cut where any of `others` begins or ends."""
    edges = {whole.start, whole.stop}
    for other in others:
        edges |= {edge for edge in (other.start, other.stop) if edge in whole}
    ordered = sorted(edges)
    return [range(low, high) for low, high in zip(ordered, ordered[1:], strict=False)]


def _covers(outer: range, inner: range) -> bool:
    return outer.start <= inner.start and inner.stop <= outer.stop
