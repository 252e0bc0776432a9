"""Readable torch versions of what `kernels.reference` does not hold. The tests' truth.

Halves are computed in float32, float32 and float64 in themselves, so that a benchmark can ask for
the answer in float64. Shapes are those of the kernels' own docstrings.
"""

from __future__ import annotations

import torch
from torch import Tensor

E4M3_MAX = 448.0  # largest finite float8_e4m3fn


def wide(x: Tensor) -> Tensor:
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def attend_rows(
    q: Tensor,
    kv: Tensor,
    tables: Tensor,
    token_starts: Tensor,
    lengths: Tensor,
    *,
    scale: float,
    window: int = 0,
    soft_cap: float = 0.0,
    scales: Tensor | None = None,
) -> Tensor:
    """Causal attention of ragged rows over their blocks, row by row, everything gathered."""
    out = torch.zeros_like(q)
    pool = wide(kv) if scales is None else dequantise(kv, scales)
    group = q.shape[1] // kv.shape[2]
    for row, length in enumerate(lengths.tolist()):
        begin, end = token_starts[row : row + 2].tolist()
        if end == begin:
            continue
        num_blocks = -(-length // kv.shape[3])
        blocks = tables[row, :num_blocks].long().clamp(min=0)  # a hole is out of the window
        k, v = pool[blocks].permute(1, 2, 0, 3, 4).flatten(2, 3)[:, :, :length]
        k, v = k.repeat_interleave(group, dim=0), v.repeat_interleave(group, dim=0)
        query = wide(q[begin:end]).transpose(0, 1)  # [heads, count, dim]
        scores = query @ k.to(query.dtype).transpose(1, 2) * scale
        if soft_cap:
            scores = soft_cap * torch.tanh(scores / soft_cap)
        position = torch.arange(length - (end - begin), length, device=q.device)[:, None]
        behind = position - torch.arange(length, device=q.device)
        hidden = (behind < 0) | (behind >= (window or length))
        weights = scores.masked_fill(hidden, -torch.inf).softmax(dim=-1)
        # What the mask hides may be garbage, and zero times NaN is not zero.
        visible = v.to(query.dtype).masked_fill(hidden.all(dim=0)[:, None], 0)
        out[begin:end] = (weights @ visible).transpose(0, 1).to(q.dtype)
    return out


def dequantise(kv: Tensor, scales: Tensor) -> Tensor:
    """float32 of `kv` float8_e4m3fn [blocks, 2, kv_heads, size, dim] under its `scales`."""
    return kv.float() * scales[..., None, None]


def power_of_two_scale(largest: Tensor) -> Tensor:
    """The smallest power of two (at least 2**-126) that brings `largest` (float32) into e4m3.

    A floating-point format loses nothing by a power of two but range, and growing such a scale
    later is exact for all values that stay normal: what a block holds then (almost) does not
    depend on the steps in which it was filled.
    """
    ratio = largest.float() * (1 / E4M3_MAX)
    exponent = ((ratio.view(torch.int32) + 0x7FFFFF) >> 23).clamp(min=1)
    return (exponent << 23).view(torch.float32)


def append_fp8(
    kv: Tensor,
    scales: Tensor,
    k: Tensor,
    v: Tensor,
    tables: Tensor,
    token_starts: Tensor,
    lengths: Tensor,
) -> None:
    """Quantise each row's new k, v [tokens, kv_heads, dim] into its last positions.

    A block's scale, one a side and head, grows with what is appended and then its older values
    are quantised again; it starts anew with the block's first position.
    """
    size = kv.shape[3]
    for row, length in enumerate(lengths.tolist()):
        begin, end = token_starts[row : row + 2].tolist()
        start = length - (end - begin)
        for index in range(start // size, -(-length // size) if end > begin else 0):
            low, high = max(start, index * size), min(length, (index + 1) * size)
            first = begin + low - start
            block, place = int(tables[row, index]), low - index * size
            for side, source in enumerate((k, v)):
                new = source[first : first + high - low].float().transpose(0, 1)
                old_scale = scales[block, side] if place else torch.zeros_like(scales[block, side])
                scale = torch.maximum(power_of_two_scale(new.abs().amax((1, 2))), old_scale)
                old = kv[block, side, :, :place].float() * old_scale[:, None, None]
                both = torch.cat((old, new), dim=1) / scale[:, None, None]
                kv[block, side, :, : place + high - low] = both.to(torch.float8_e4m3fn)
                scales[block, side] = scale


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """LayerNorm over the last dimension, in float32, rounded once (Ba et al. 2016)."""
    h = wide(x)
    centred = h - h.mean(-1, keepdim=True)
    normed = centred * torch.rsqrt(centred.pow(2).mean(-1, keepdim=True) + eps)
    return (normed * wide(weight) + wide(bias)).to(x.dtype)


def copy_blocks(
    source: Tensor, target: Tensor, source_blocks: Tensor, target_blocks: Tensor
) -> None:
    """target[:, target_blocks[i]] = source[:, source_blocks[i]]; first dimension: layers."""
    target[:, target_blocks.long()] = source[:, source_blocks.long()]


def grouped_matmul(x: Tensor, weights: Tensor, rows: Tensor, starts: Tensor) -> Tensor:
    """out[i] = weights[expert of i] @ x[rows[i]]; expert e owns [starts[e], starts[e + 1])."""
    out = x.new_zeros((rows.shape[0], weights.shape[1]))
    bounds = starts.tolist()
    for expert, (begin, end) in enumerate(zip(bounds, bounds[1:], strict=False)):
        chosen = wide(x[rows[begin:end].long()])
        out[begin:end] = (chosen @ wide(weights[expert]).T).to(x.dtype)
    return out
