"""Both attention kernels over shuffled blocks, beside torch's own over the same keys laid dense."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from phasewise.engine.cache import KVCache
from phasewise.engine.layout import FP8, KVLayout
from phasewise.kernels import reference as shared
from phasewise.kernels.cuda import reference
from phasewise.kernels.cuda.decode_attention import (
    DecodeTiling,
    decode_attention,
    splits_for,
)
from phasewise.kernels.cuda.prefill_attention import PrefillTiling, prefill_attention
from torch import Tensor

from .case import BLOCK_SIZE, Case, Device, Sizes


@dataclass(frozen=True, kw_only=True)
class Paged:
    """Rows of equal length over shuffled blocks, and the same keys and values laid out densely."""

    kv: Tensor
    tables: Tensor
    lengths: Tensor

    def dense(self) -> tuple[Tensor, Tensor]:
        """k, v [rows, kv_heads, length, dim]."""
        length = int(self.lengths[0])
        gathered = self.kv[self.tables.long()].permute(2, 0, 3, 1, 4, 5).flatten(3, 4)
        return gathered[0][:, :, :length].contiguous(), gathered[1][:, :, :length].contiguous()


def paged(on: Device, rows: int, length: int, sizes: Sizes, *, fp8: bool = False) -> Paged:
    width = -(-length // BLOCK_SIZE)
    shape = (rows * width, 2, sizes.kv_heads, BLOCK_SIZE, sizes.dim)
    kv = on.normal(*shape)
    if fp8:
        k, v = kv.permute(1, 0, 3, 2, 4).flatten(1, 2)
        kv = fp8_layer(on, shape[0], sizes)
        shared.append(kv, k, v, torch.arange(len(k), device=on.device))
    tables = torch.randperm(rows * width, device=on.device).int().view(rows, width)
    lengths = torch.full((rows,), length, dtype=torch.int32, device=on.device)
    return Paged(kv=kv, tables=tables, lengths=lengths)


def fp8_layer(on: Device, num_blocks: int, sizes: Sizes) -> Tensor:
    layout = KVLayout(
        num_layers=1,
        num_blocks=num_blocks,
        num_kv_heads=sizes.kv_heads,
        block_size=BLOCK_SIZE,
        head_dim=sizes.dim,
        dtype=FP8,
    )
    buffer = torch.zeros(layout.num_bytes, dtype=torch.uint8, device=on.device)
    return KVCache(layout, buffer).layers[0]


def _starts(on: Device, rows: int, count: int) -> Tensor:
    return (torch.arange(rows + 1, device=on.device) * count).int()


def decode_case(
    on: Device, sizes: Sizes, *, fp8: bool = False, tiling: DecodeTiling | None = None
) -> Case:
    rows, length, scale = sizes.rows, sizes.length, sizes.dim**-0.5
    data = paged(on, rows, length, sizes, fp8=fp8)
    q = on.normal(rows, sizes.heads, sizes.dim)
    splits = splits_for(rows, sizes.kv_heads, length, on.multiprocessors)
    options: dict[str, Any] = {"scale": scale}
    peers: dict[str, Callable[[], Any]] = {}
    if not fp8:
        k, v = data.dense()
        peers["sdpa"] = lambda: F.scaled_dot_product_attention(
            q[:, :, None], k, v, scale=scale, enable_gqa=True
        )
    item = 1 if fp8 else 2
    return Case(
        name=f"decode attention{', fp8' * fp8}, {rows} x {length}, {splits} splits",
        run=lambda: decode_attention(
            q, data.kv, data.tables, data.lengths, num_splits=splits, tiling=tiling, **options
        ),
        truth=lambda: reference.attend_rows(
            q.double(),
            data.kv if fp8 else data.kv.double(),
            data.tables,
            _starts(on, rows, 1),
            data.lengths,
            **options,
        ),
        tolerance=1e-2,
        num_bytes=item * 2 * rows * length * sizes.kv_heads * sizes.dim,
        flops=4 * rows * length * sizes.heads * sizes.dim,
        peers=peers,
    )


def prefill_case(
    on: Device, sizes: Sizes, *, fp8: bool = False, tiling: PrefillTiling | None = None
) -> Case:
    """One row whose last `chunk` positions are computed, of `length`."""
    length, chunk, scale = sizes.length, min(sizes.chunk, sizes.length), sizes.dim**-0.5
    data, starts = paged(on, 1, length, sizes, fp8=fp8), _starts(on, 1, chunk)
    q = on.normal(chunk, sizes.heads, sizes.dim)
    options: dict[str, Any] = {"scale": scale}
    peers: dict[str, Callable[[], Any]] = {}
    if chunk == length and not fp8:
        k, v = data.dense()
        query = q.transpose(0, 1)[None]
        peers["sdpa"] = lambda: F.scaled_dot_product_attention(
            query, k, v, scale=scale, is_causal=True, enable_gqa=True
        )
        if on.device.type == "cuda":
            peers["flex"] = _flex(query, k, v, scale)
    pairs = chunk * (length - chunk) + chunk * (chunk + 1) // 2
    rows = (data.tables, starts, data.lengths)
    return Case(
        name=f"prefill attention{', fp8' * fp8}, {chunk} of {length}",
        run=lambda: prefill_attention(q, data.kv, *rows, tiling=tiling, **options),
        truth=lambda: reference.attend_rows(
            q.double(), data.kv if fp8 else data.kv.double(), *rows, **options
        ),
        tolerance=1e-2,
        flops=4 * pairs * sizes.heads * sizes.dim,
        peers=peers,
    )


def _flex(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Callable[[], Any]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def causal(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return query >= key

    mask = create_block_mask(causal, None, None, q.shape[2], k.shape[2], device=str(q.device))
    compiled: Any = torch.compile(flex_attention)
    return lambda: compiled(q, k, v, block_mask=mask, scale=scale, enable_gqa=True)
