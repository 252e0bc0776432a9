"""The pool of KV blocks: one contiguous array in a buffer that someone may share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .layout import KVLayout

TORCH_DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}

# Takes bytes, returns a writable buffer or uint8 tensor of at least so many.
AllocateBuffer = Callable[[int], Any]


class KVCache:
    """KV of all layers, `layers[i]: [blocks, 2, kv_heads, block_size, head_dim]`.

    Views the buffer, copies nothing; the buffer must outlive it.
    """

    def __init__(self, layout: KVLayout, buffer: Any) -> None:
        flat = buffer if isinstance(buffer, Tensor) else torch.frombuffer(buffer, dtype=torch.uint8)
        flat = flat.view(-1).view(torch.uint8)
        assert flat.numel() >= layout.num_bytes, "the buffer is smaller than the pool"
        self.layout = layout
        self.pool = flat[: layout.num_bytes].view(TORCH_DTYPES[layout.dtype]).view(layout.shape)
        self.layers = list(self.pool)


def plain_buffer(num_bytes: int) -> Tensor:
    """Private memory, for a worker that shares none."""
    return torch.empty(num_bytes, dtype=torch.uint8)
