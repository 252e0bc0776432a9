"""The shape of a KV pool in memory. What two workers must agree on before blocks move."""

from __future__ import annotations

from dataclasses import dataclass

ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


@dataclass(frozen=True, kw_only=True, slots=True)
class KVLayout:
    """A pool is one contiguous array `[layers, blocks, 2, kv_heads, block_size, head_dim]`.

    The 2 is key, value. All of one block of one layer is contiguous (`block_bytes`), so a run of
    neighbouring blocks is one copy a layer, and a range of heads is one copy a block and side.
    """

    num_layers: int
    num_blocks: int
    num_kv_heads: int
    block_size: int  # positions a block
    head_dim: int
    dtype: str  # "float32" | "float16" | "bfloat16"
    fingerprint: str = ""  # of the checkpoint: KV of another model is never accepted

    @property
    def shape(self) -> tuple[int, int, int, int, int, int]:
        return (
            self.num_layers,
            self.num_blocks,
            2,
            self.num_kv_heads,
            self.block_size,
            self.head_dim,
        )

    @property
    def block_bytes(self) -> int:
        """Bytes of one block in one layer, keys and values."""
        return 2 * self.num_kv_heads * self.block_size * self.head_dim * ITEM_BYTES[self.dtype]

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
