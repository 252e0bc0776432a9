"""What of one pool moves over a pair, and where it lies. Pure numbers.

Two pools may hold other layers and heads, in blocks of another size. What both hold is a window
into each of them, of the same number of layers and heads. It is counted in units: as many
positions as the smaller side's blocks have. A unit is made of pieces, each contiguous in both
pools: for keys and values, for each head, each section of its tile, in this order.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from ..engine.layout import KVLayout

Offsets = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, eq=False)
class Window:
    """`layers` and `heads` count from the pool's own first ones."""

    layout: KVLayout
    layers: range
    heads: range
    step: int  # positions a unit
    is_cut: bool  # the two sides' blocks are of different sizes

    def __post_init__(self) -> None:
        assert self.layout.block_size % self.step == 0, "units fill a block"
        assert self.is_cut or self.step == self.layout.block_size, "a block is a unit"

    @cached_property
    def is_whole(self) -> bool:
        """All of the pool's blocks, as they lie there."""
        whole = len(self.layers) == self.layout.num_layers
        return whole and len(self.heads) == self.layout.num_kv_heads and not self.is_cut

    @cached_property
    def per_block(self) -> int:
        """Units in a block."""
        return self.layout.block_size // self.step

    @cached_property
    def num_units(self) -> int:
        """In the whole pool."""
        return self.layout.num_blocks * self.per_block

    @cached_property
    def unit_bytes(self) -> int:
        """Of one unit in one layer."""
        return int(self._lengths.sum())

    @cached_property
    def grain(self) -> int:
        """Bytes that divide every piece's length and place in the pool."""
        block = (self.layout.block_bytes, self.layout.layer_bytes)
        return math.gcd(*block, *self._lengths.tolist(), *self._starts.reshape(-1).tolist())

    def units(self, blocks: Sequence[int]) -> tuple[int, ...]:
        """Of these blocks, in token order. Unit `u` lies in block `u // per_block`."""
        count = self.per_block
        if count == 1:
            return tuple(blocks)
        return tuple([block * count + index for block in blocks for index in range(count)])

    def layer_offset(self, index: int) -> int:
        """Where the window's layer `index` begins in the pool."""
        return self.layout.offset(self.layers.start + index, 0)

    def offsets(self, units: Sequence[int]) -> Offsets:  # [units * pieces]
        """Where each piece begins, from the start of its layer."""
        ids = np.asarray(units, dtype=np.int64)
        assert ids.size == 0 or (ids.min() >= 0 and ids.max() < self.num_units)
        base = ids // self.per_block * self.layout.block_bytes
        return (base[:, None] + self._starts[ids % self.per_block]).reshape(-1)

    def lengths(self, num_units: int) -> Offsets:  # [units * pieces]
        return np.tile(self._lengths, num_units)

    def runs(self, units: Sequence[int]) -> list[tuple[int, int]]:
        """(offset from the start of the layer, bytes), in order, neighbours as one."""
        here, lengths = self.offsets(units), self.lengths(len(units))
        firsts, sizes = _joined(lengths, here)
        return list(zip(here[firsts].tolist(), sizes.tolist(), strict=True))

    def grains(self, units: Sequence[int], grain: int) -> Offsets:
        """Every piece of `units` as numbers of a `grain` that divides them, from the start of
        the layer."""
        here, counts = self.offsets(units) // grain, self._lengths // grain
        within = np.concatenate([np.arange(count) for count in counts])
        per_unit = np.repeat(here.reshape(len(units), -1), counts, axis=1)
        return (per_unit + within).reshape(-1)

    @cached_property
    def _lengths(self) -> Offsets:  # of a unit's pieces
        sizes = [size for _, size in self._sections]
        return np.tile(np.asarray(sizes, dtype=np.int64), 2 * len(self.heads))

    @cached_property
    def _starts(self) -> Offsets:  # [per_block, pieces]: from the start of a block
        tile = self.layout.tile_bytes
        sides = np.arange(2) * self.layout.num_kv_heads * tile
        heads = np.arange(self.heads.start, self.heads.stop) * tile
        tiles = (sides[:, None] + heads).reshape(-1)
        rows = [
            [start + index * size for start, size in self._sections]
            for index in range(self.per_block)
        ]
        inside = np.asarray(rows, dtype=np.int64)
        return (tiles[None, :, None] + inside[:, None, :]).reshape(self.per_block, -1)

    @property
    def _sections(self) -> list[tuple[int, int]]:
        """(offset in a tile, bytes of a unit). Uncut: tiles as they are, filled up or not."""
        if not self.is_cut:
            return [(0, self.layout.tile_bytes)]
        return [(start, self.step * row) for start, row in self.layout.sections]


def spans(
    source: Window, target: Window, here: Sequence[int], there: Sequence[int]
) -> Offsets:  # [copies, 3]
    """(offset in the source, in the target, bytes), from the start of a layer, for units that
    follow one another on each side. Neighbours on both sides are one copy."""
    starts, goals = source.offsets(here), target.offsets(there)
    firsts, sizes = _joined(source.lengths(len(here)), starts, goals)
    return np.stack((starts[firsts], goals[firsts], sizes), axis=1)


def _joined(lengths: Offsets, *places: Offsets) -> tuple[Offsets, Offsets]:
    """Which pieces begin a run that is contiguous in all `places`, and the runs' bytes."""
    if not len(lengths):
        return np.empty(0, np.int64), np.empty(0, np.int64)
    follows = np.ones(len(lengths) - 1, bool)
    for place in places:
        follows &= np.diff(place) == lengths[:-1]
    firsts = np.flatnonzero(np.concatenate(([True], ~follows)))
    return firsts, np.add.reduceat(lengths, firsts)
