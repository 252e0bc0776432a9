"""Matrix products of a mixture of experts, all experts in one launch.

Slots (token, chosen expert) are sorted by expert. Tiles of slots find their expert on the device,
read their tokens through `rows` without a gathered copy, and an expert without tokens costs one
program that leaves at once. The readable versions are `reference.grouped_matmul` and, of a whole
mixture, `..experts.by_loop`.
"""

# What a kernel's values are, Triton's decorators hide from a type checker.
# pyright: reportCallIssue=false, reportArgumentType=false, reportOperatorIssue=false
# pyright: reportAttributeAccessIssue=false
# ruff: noqa: ANN001
from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..experts import Routing
from .activations import silu_mul
from .ragged import find_row, num_tiles


@triton.jit
def grouped_matmul_kernel(
    out,
    x,
    weights,
    rows,
    starts,
    factors,
    num_experts,
    x_stride,
    OUT_DIM: tl.constexpr,
    IN_DIM: tl.constexpr,
    SLOTS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    SCALED: tl.constexpr,
    WIDE: tl.constexpr,  # products in float32: Triton's interpreter is wrong in bfloat16
) -> None:
    number = tl.program_id(1)
    expert = find_row(starts, num_experts, number, SLOTS)
    begin = tl.load(starts + expert)
    end = tl.load(starts + expert + 1)
    first = begin + (number - begin // SLOTS - expert) * SLOTS
    if first >= end:
        return
    slot = first + tl.arange(0, SLOTS)
    token = tl.load(rows + slot, mask=slot < end, other=0).to(tl.int64)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    depth = tl.arange(0, DEPTH)
    left = x + token[:, None] * x_stride + depth[None, :]
    right = weights + expert.to(tl.int64) * (OUT_DIM * IN_DIM)
    right += column[:, None].to(tl.int64) * IN_DIM + depth[None, :]
    acc = tl.zeros([SLOTS, COLUMNS], tl.float32)
    for step in range(tl.cdiv(IN_DIM, DEPTH)):
        inside = (step * DEPTH + depth < IN_DIM)[None, :]
        a = tl.load(left + step * DEPTH, mask=inside & (slot < end)[:, None], other=0.0)
        b = tl.load(right + step * DEPTH, mask=inside & (column < OUT_DIM)[:, None], other=0.0)
        if WIDE:
            a = a.to(tl.float32)
            b = b.to(tl.float32)
        acc = tl.dot(a, tl.trans(b), acc, input_precision="ieee")
    if SCALED:
        acc *= tl.load(factors + slot, mask=slot < end, other=0.0).to(tl.float32)[:, None]
    cells = (slot < end)[:, None] & (column < OUT_DIM)[None, :]
    at = slot[:, None].to(tl.int64) * OUT_DIM + column[None, :]
    tl.store(out + at, acc.to(out.dtype.element_ty), mask=cells)


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertTiling:
    slots: int
    columns: int
    depth: int
    num_warps: int
    num_stages: int

    @classmethod
    def of(cls, slots_per_expert: float) -> ExpertTiling:
        """Few slots an expert: read the weights once, 16 rows of them wasted at most."""
        if slots_per_expert <= 32:
            return cls(slots=16, columns=64, depth=128, num_warps=4, num_stages=4)
        return cls(slots=128, columns=128, depth=64, num_warps=8, num_stages=3)


def grouped_matmul(
    x: Tensor,
    weights: Tensor,
    rows: Tensor,
    starts: Tensor,
    *,
    factors: Tensor | None = None,
    tiling: ExpertTiling | None = None,
) -> Tensor:
    """out[i] = weights[expert of i] @ x[rows[i]], times factors[i]: [slots, out_dim].

    `x` [tokens, in_dim]; `weights` [experts, out_dim, in_dim]; `rows` int32 [slots]; expert e has
    the slots `[starts[e], starts[e + 1])`, `starts` int32 [experts + 1]; `factors` [slots].
    """
    experts, out_dim, in_dim = weights.shape
    slots = rows.shape[0]
    assert x.stride(1) == 1 and weights.is_contiguous()
    out = torch.empty((slots, out_dim), dtype=x.dtype, device=x.device)
    if slots == 0:
        return out
    tiling = tiling or ExpertTiling.of(slots / experts)
    grid = (triton.cdiv(out_dim, tiling.columns), num_tiles(slots, experts, tiling.slots))
    grouped_matmul_kernel[grid](
        out,
        x,
        weights,
        rows,
        starts,
        factors,
        experts,
        x.stride(0),
        OUT_DIM=out_dim,
        IN_DIM=in_dim,
        SLOTS=tiling.slots,
        COLUMNS=tiling.columns,
        DEPTH=tiling.depth,
        SCALED=factors is not None,
        WIDE=x.device.type == "cpu" and x.dtype == torch.bfloat16,
        num_warps=tiling.num_warps,
        num_stages=tiling.num_stages,
        enable_fp_fusion=True,
    )
    return out


def mixture(
    x: Tensor,  # [tokens, hidden]
    gate_up: Tensor,  # [experts, 2 * inner, hidden]
    down: Tensor,  # [experts, hidden, inner]
    routing: Routing,
) -> Tensor:  # [tokens, hidden]
    """Weighted sums over each token's experts; weighed in float32, then rounded, summed in it."""
    inner = silu_mul(grouped_matmul(x, gate_up, routing.rows, routing.starts))
    slots = torch.arange(len(inner), dtype=torch.int32, device=x.device)
    out = grouped_matmul(inner, down, slots, routing.starts, factors=routing.factors)
    return out[routing.places].sum(dim=1)
