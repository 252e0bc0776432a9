"""The shape of a KV pool in memory. What two workers must agree on before blocks move."""

from __future__ import annotations

from dataclasses import dataclass

ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
FP8 = "fp8_e4m3"
SCALE_BYTES = 1  # a position and head of FP8: the exponent of its power of two
_TILE_ALIGNMENT = 16  # what a GPU loads at once


@dataclass(frozen=True, kw_only=True, slots=True)
class KVLayout:
    """A pool is one contiguous array of tiles, `[layers, blocks, 2, kv_heads, tile]`.

    The 2 is key, value. A tile is one KV head's `[block_size, head_dim]`; in FP8 the scales of its
    positions follow, one byte each, and it is filled up to 16 bytes. All of one block of one layer
    is contiguous (`block_bytes`), so a run of neighbouring blocks is one copy a layer, and a range
    of heads is one copy a block and side. Whoever moves a block moves its scales with it.
    """

    num_layers: int
    num_blocks: int
    num_kv_heads: int
    block_size: int  # positions a block
    head_dim: int
    dtype: str  # "float32" | "float16" | "bfloat16" | "fp8_e4m3"
    fingerprint: str = ""  # of the checkpoint: KV of another model is never accepted

    @property
    def shape(self) -> tuple[int, int, int, int, int, int]:
        """Of the values, without scales."""
        return (
            self.num_layers,
            self.num_blocks,
            2,
            self.num_kv_heads,
            self.block_size,
            self.head_dim,
        )

    @property
    def is_fp8(self) -> bool:
        return self.dtype == FP8

    @property
    def sections(self) -> tuple[tuple[int, int], ...]:
        """(offset in a tile, bytes a position) of what a tile holds: values, then scales."""
        if self.is_fp8:
            return ((0, self.head_dim), (self.block_size * self.head_dim, SCALE_BYTES))
        return ((0, self.head_dim * ITEM_BYTES[self.dtype]),)

    @property
    def tile_bytes(self) -> int:
        """Bytes of one KV head's keys, or values, in one block of one layer."""
        num_bytes = self.block_size * sum(row for _, row in self.sections)
        return -(-num_bytes // _TILE_ALIGNMENT) * _TILE_ALIGNMENT if self.is_fp8 else num_bytes

    @property
    def block_bytes(self) -> int:
        """Bytes of one block in one layer, keys and values."""
        return 2 * self.num_kv_heads * self.tile_bytes

    @property
    def layer_bytes(self) -> int:
        return self.num_blocks * self.block_bytes

    @property
    def num_bytes(self) -> int:
        return self.num_layers * self.layer_bytes

    def offset(self, layer: int, block: int) -> int:
        """Where a block of a layer starts, in bytes from the start of the pool."""
        return (layer * self.num_blocks + block) * self.block_bytes

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold `num_tokens` positions."""
        return -(-num_tokens // self.block_size)
