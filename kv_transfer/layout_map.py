"""Which bytes go where when KV moves between pools that are split differently. Pure numbers.

Each rank of a worker holds some layers and some KV heads of every block, its block ids are its
worker's, and one side's block size divides the other's. What two ranks both hold is a `Route`;
its `windows` say which bytes of their pools that is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..engine.layout import KVLayout
from .events import PeerRefused
from .window import Window

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


def windows(route: Route) -> tuple[Window, Window]:
    """What a route moves, in the source's pool and in the target's."""
    sizes = route.source.layout.block_size, route.target.layout.block_size
    source, target = (
        Window(
            layout=part.layout,
            layers=_within(part.layers, route.layers),
            heads=_within(part.kv_heads, route.kv_heads),
            step=min(sizes),
            is_cut=sizes[0] != sizes[1],
        )
        for part in (route.source, route.target)
    )
    return source, target


def _within(outer: range, inner: range) -> range:
    """`inner`, counted from where `outer` begins."""
    return range(inner.start - outer.start, inner.stop - outer.start)


def _cuts(whole: range, others: Sequence[range]) -> list[range]:
    """`whole` cut where any of `others` begins or ends."""
    edges = {whole.start, whole.stop}
    for other in others:
        edges |= {edge for edge in (other.start, other.stop) if edge in whole}
    ordered = sorted(edges)
    return [range(low, high) for low, high in zip(ordered, ordered[1:], strict=False)]


def _covers(outer: range, inner: range) -> bool:
    return outer.start <= inner.start and inner.stop <= outer.stop
