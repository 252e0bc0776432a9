"""Readable torch versions of what `kernels.reference` does not hold. The tests' truth.

Halves are computed in float32, float32 and float64 in themselves, so that a benchmark can ask for
the answer in float64. Shapes are those of the kernels' own docstrings.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import fp8


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
) -> Tensor:
    """Causal attention of ragged rows over their blocks, row by row, everything gathered."""
    out = torch.zeros_like(q)
    pool = fp8.dequantise(kv, fp8.scales_of(kv)) if kv.dtype == fp8.E4M3 else wide(kv)
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


def apply_changes(
    columns: Tensor, tables: Tensor, changes: Tensor, *, num_rows: int, num_entries: int
) -> None:
    """Unpack `changes`: slots, fields of the slots, places in the tables, block ids."""
    fields = columns.shape[0]
    slots, values = changes[: (1 + fields) * num_rows].view(1 + fields, num_rows).split((1, fields))
    columns[:, slots[0]] = values
    places, blocks = changes[(1 + fields) * num_rows :][: 2 * num_entries].view(2, num_entries)
    tables.view(-1)[places] = blocks.int()


def locate(positions: Tensor, tables: Tensor, *, block_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """KV slots, lengths and angles of rows whose next token stands at `positions` int64 [rows]."""
    here = positions.clamp(min=0)
    blocks = tables[torch.arange(len(positions)), here // block_size].long()
    slots = blocks * block_size + here % block_size
    return slots.masked_fill(positions < 0, -1), (positions + 1).int(), here


def advance(positions: Tensor, tokens: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Positions and tokens of the next step, where padding (below zero) stays."""
    is_live = positions >= 0
    return positions + is_live, torch.where(is_live, chosen, tokens)
