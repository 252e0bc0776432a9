"""Readable torch versions of every kernel; what runs on CUDA and in float16, and the tests' truth.

Shapes: a layer of the pool is `kv: [blocks, 2, kv_heads, block_size, head_dim]`; one of
float8_e4m3fn has scales between its tiles, as `fp8` says.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import fp8


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm over the last dimension, in float32, rounded before the weight is applied."""
    wide = x.float()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * normed.to(x.dtype)


def silu_mul(gate_up: Tensor) -> Tensor:
    """silu(gate) * up for rows of [gate, up]."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def rotate(x: Tensor, cos_sin: Tensor) -> Tensor:
    """Rotary positions. x: [tokens, heads, dim], cos_sin: [tokens, dim] float32 (cos, then sin)."""
    cos, sin = cos_sin.unsqueeze(1).chunk(2, dim=-1)
    first, second = x.float().chunk(2, dim=-1)
    rotated = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return rotated.to(x.dtype)


def append(kv: Tensor, k: Tensor, v: Tensor, slots: Tensor) -> None:
    """Write k, v [tokens, kv_heads, dim] at slots [tokens] (block * block_size + offset)."""
    if kv.dtype == fp8.E4M3:
        fp8.append(kv, k, v, slots)
        return
    block, offset = slots // kv.shape[3], slots % kv.shape[3]
    kv[block, 0, :, offset] = k
    kv[block, 1, :, offset] = v


def _causal_mask(start: int, count: int, begin: int, window: int, device: torch.device) -> Tensor:
    """Which of the positions [begin, start + count) each of [start, start + count) sees."""
    queries = torch.arange(start, start + count, device=device).unsqueeze(1)
    keys = torch.arange(begin, start + count, device=device)
    seen = keys <= queries
    return seen & (keys > queries - window) if window else seen


def attend(
    q: Tensor,  # [count, heads, dim]: positions [start, start + count) of one sequence
    kv: Tensor,
    blocks: Tensor,  # int64: the sequence's block table
    start: int,
    *,
    window: int,
    scale: float,
) -> Tensor:  # [count, heads, dim]
    """Causal attention of one row over its blocks, gathered. `window` 0: the whole context."""
    seen = visible_blocks(start, len(q), window, kv.shape[3])
    ids = blocks[seen.start : seen.stop]
    gathered = fp8.gather(kv, ids).to(q.dtype) if kv.dtype == fp8.E4M3 else kv[ids]
    k, v = gathered.permute(1, 2, 0, 3, 4).flatten(2, 3)
    return attend_dense(q, k, v, start, seen.start * kv.shape[3], window=window, scale=scale)


def visible_blocks(start: int, count: int, window: int, block_size: int) -> range:
    """Places in the block table of what the positions [start, start + count) see."""
    first = max(0, start + 1 - window) // block_size if window else 0
    return range(first, -(-(start + count) // block_size))


def attend_dense(
    q: Tensor,  # [count, heads, dim]: positions [start, start + count) of one sequence
    k: Tensor,  # [kv_heads, positions, dim]: from position `begin` to the last or behind it
    v: Tensor,
    start: int,
    begin: int,
    *,
    window: int,
    scale: float,
) -> Tensor:  # [count, heads, dim]
    """Causal attention of one row over keys and values that lie in order of position."""
    count, heads, dim = q.shape
    k, v = k[:, : start + count - begin], v[:, : start + count - begin]
    kv_heads = len(k)
    group = heads // kv_heads
    one_triangle = begin == start and not window and count > 1
    sees_all = count == 1 and not window
    mask = None
    if not (one_triangle or sees_all):
        mask = _causal_mask(start, count, begin, window, q.device)
    out = F.scaled_dot_product_attention(
        q.reshape(count, kv_heads, group, dim).permute(1, 2, 0, 3),
        k.unsqueeze(1).expand(-1, group, -1, -1),  # a KV head is shared, not repeated
        v.unsqueeze(1).expand(-1, group, -1, -1),
        attn_mask=mask,
        is_causal=one_triangle,
        scale=scale,
    )
    return out.permute(2, 0, 1, 3).reshape(count, heads, dim)
