"""FP8 layers as a pool has them, with the bytes of former tenants."""

from __future__ import annotations

from phasewise.engine.cache import KVCache, plain_buffer
from phasewise.engine.layout import FP8, KVLayout
from torch import Tensor


def fp8_layer(num_blocks: int, kv_heads: int, block_size: int, head_dim: int) -> Tensor:
    layout = KVLayout(
        num_layers=2,
        num_blocks=num_blocks,
        num_kv_heads=kv_heads,
        block_size=block_size,
        head_dim=head_dim,
        dtype=FP8,
    )
    buffer = plain_buffer(layout.num_bytes)
    buffer.fill_(0xA5)
    return KVCache(layout, buffer).layers[1]
