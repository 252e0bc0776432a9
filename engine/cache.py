"""The pool of KV blocks: one contiguous array in a buffer that someone may share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .layout import FP8, KVLayout

TORCH_DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    FP8: torch.float8_e4m3fn,
}

# Takes bytes, returns a writable buffer or uint8 tensor of at least so many.
AllocateBuffer = Callable[[int], Any]


class KVCache:
    """KV of all layers, `layers[i]: [blocks, 2, kv_heads, block_size, head_dim]`.

    Views the buffer, copies nothing; the buffer must outlive it. In FP8 a layer is a view with the
    scales between its tiles: `kernels.fp8.scales_of(layer)` finds them.
    """

    def __init__(self, layout: KVLayout, buffer: Any) -> None:
        flat = buffer if isinstance(buffer, Tensor) else torch.frombuffer(buffer, dtype=torch.uint8)
        flat = flat.view(-1).view(torch.uint8)
        assert flat.numel() >= layout.num_bytes, "the buffer is smaller than the pool"
        self.layout = layout
        values = flat[: layout.num_bytes].view(TORCH_DTYPES[layout.dtype])
        # Written out: torch may give a dimension of one head a stride without the scales.
        tiles = values.view(*layout.shape[:4], -1).stride()[:4]
        self.pool = values.as_strided(layout.shape, (*tiles, layout.head_dim, 1))
        self.layers = list(self.pool)


def plain_buffer(num_bytes: int) -> Tensor:
    """Private memory, for a worker that shares none."""
    return torch.empty(num_bytes, dtype=torch.uint8)
