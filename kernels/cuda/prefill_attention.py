"""Causal attention of prompt chunks over their KV blocks, rows of any length in one launch.

A program takes a tile of neighbouring query positions with all query heads of one KV head (so
that K and V are read once for the group) and runs over the row's keys: first the tiles that every
query of the tile sees, without a mask, then those on the diagonal. The chunk's own keys are
already in the blocks. Longest work first: tiles are taken from the end, so that short ones fill
the tail of the grid.

The readable version is `reference.attend_rows`.
"""

# What a kernel's values are, Triton's decorators hide from a type checker.
# pyright: reportCallIssue=false, reportArgumentType=false, reportOperatorIssue=false
# pyright: reportAttributeAccessIssue=false
# ruff: noqa: ANN001, ANN202
from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..fp8 import E4M3
from .attention_tile import attend_tile, empty_state
from .decode_attention import NO_WINDOW
from .e4m3 import head_stride, scales_or_layer
from .ragged import find_row, num_tiles


@triton.jit
def _visit(
    query, state, tile, at_position, first, kv, scales, table, kv_head, length, scale, window,
    KV_HEADS: tl.constexpr, DIM: tl.constexpr, DIM_PAD: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    HEAD_STRIDE: tl.constexpr, TILE: tl.constexpr, SOFT_CAP: tl.constexpr, FP8: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """Fold the keys of one tile into `state`; MASKED where not every query sees all of them."""
    position = tile * TILE + tl.arange(0, TILE)
    known = position >= 0
    if MASKED:
        # Blocks that fell out of the window may be gone from the table.
        known = (position < length) & (position > first - window)
    block = tl.load(table + position // BLOCK_SIZE, mask=known, other=0).to(tl.int64)
    behind = at_position[:, None] - position[None, :]
    return attend_tile(
        query, state, kv, scales, block, position, known, (behind >= 0) & (behind < window),
        scale, kv_head, KV_HEADS, DIM, DIM_PAD, BLOCK_SIZE, HEAD_STRIDE, SOFT_CAP, FP8, MASKED,
    )  # fmt: skip


@triton.jit(do_not_specialize=["num_rows"])
def prefill_kernel(
    out, q, kv, scales, tables, token_starts, lengths,
    num_rows, q_stride, out_stride, table_stride, scale, window,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, GROUP_PAD: tl.constexpr,
    DIM: tl.constexpr, DIM_PAD: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    POSITIONS: tl.constexpr, TILE: tl.constexpr,
    HEAD_STRIDE: tl.constexpr, SOFT_CAP: tl.constexpr, FP8: tl.constexpr, WINDOWED: tl.constexpr,
    WIDE: tl.constexpr,
) -> None:  # fmt: skip
    """POSITIONS queries of GROUP_PAD heads a program. WIDE: products in float32, because Triton's
    interpreter is wrong in bfloat16. The rest as in `prefill_attention`.
    """
    kv_head = tl.program_id(0)
    number = tl.num_programs(1) - 1 - tl.program_id(1)
    row = find_row(token_starts, num_rows, number, POSITIONS)
    begin = tl.load(token_starts + row)
    count = tl.load(token_starts + row + 1) - begin
    start = (number - begin // POSITIONS - row) * POSITIONS
    if start >= count:
        return
    entry = tl.arange(0, POSITIONS * GROUP_PAD)
    chosen = start + entry // GROUP_PAD
    member = entry % GROUP_PAD
    dims = tl.arange(0, DIM_PAD)
    own = (chosen < count) & (member < HEADS // KV_HEADS)
    cells = own[:, None] & (dims < DIM)[None, :]
    token = (begin + chosen).to(tl.int64)
    column = (kv_head * (HEADS // KV_HEADS) + member)[:, None] * DIM + dims[None, :]
    query = tl.load(q + token[:, None] * q_stride + column, mask=cells, other=0.0)
    if WIDE:
        query = query.to(tl.float32)

    length = tl.load(lengths + row)
    at_position = length - count + chosen
    first = length - count + start  # the tile's smallest position
    table = tables + row.to(tl.int64) * table_stride
    state = empty_state(POSITIONS * GROUP_PAD, DIM_PAD)
    low = 0
    if WINDOWED:
        low = tl.maximum(first + 1 - window, 0) // TILE
    else:
        diagonal = (first + 1) // TILE
        for tile in range(diagonal):
            state = _visit(
                query, state, tile, at_position, first, kv, scales, table, kv_head, length, scale,
                window, KV_HEADS, DIM, DIM_PAD, BLOCK_SIZE, HEAD_STRIDE, TILE, SOFT_CAP, FP8, False,
            )  # fmt: skip
        low = diagonal
    for tile in range(low, tl.cdiv(tl.minimum(length, first + POSITIONS), TILE)):
        state = _visit(
            query, state, tile, at_position, first, kv, scales, table, kv_head, length, scale,
            window, KV_HEADS, DIM, DIM_PAD, BLOCK_SIZE, HEAD_STRIDE, TILE, SOFT_CAP, FP8, True,
        )  # fmt: skip
    _, sums, acc = state
    acc = acc / tl.where(sums > 0, sums, 1.0)[:, None]
    tl.store(out + token[:, None] * out_stride + column, acc.to(out.dtype.element_ty), mask=cells)


@dataclass(frozen=True, kw_only=True, slots=True)
class PrefillTiling:
    """How the work is cut. `rows`: query positions x heads of a program; `tile`: its keys."""

    rows: int
    tile: int
    num_warps: int
    num_stages: int

    @classmethod
    def of(cls, head_dim: int) -> PrefillTiling:
        """The largest tiles whose accumulators stay in registers (asserted for sm_90)."""
        if head_dim <= 128:
            return cls(rows=128, tile=64, num_warps=8, num_stages=3)
        return cls(rows=128, tile=32, num_warps=8, num_stages=2)


def prefill_attention(
    q: Tensor,
    kv: Tensor,
    tables: Tensor,
    token_starts: Tensor,
    lengths: Tensor,
    *,
    scale: float,
    window: int = 0,
    soft_cap: float = 0.0,
    tiling: PrefillTiling | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Attention of q [tokens, heads, dim] (tokens may be strided) over a layer's blocks, into
    `out`.

    Row r's queries are tokens `[token_starts[r], token_starts[r + 1])` (int32 [rows + 1]) and the
    last positions of its context of `lengths[r]` (int32 [rows]), whose keys and values are in
    `kv` [blocks, 2, kv_heads, block_size, dim] under `tables` int32 [rows, max_blocks]. Rows may
    be empty. Tokens behind the last row are not written. `window` 0: the whole context.
    A float8_e4m3fn `kv` has its scales between its tiles (`kernels.fp8`). Nothing waits.
    """
    tokens, heads, dim = q.shape
    assert q.stride(2) == 1 and q.stride(1) == dim, "heads lie side by side"
    _, _, kv_heads, block_size, _ = kv.shape
    tiling = tiling or PrefillTiling.of(dim)
    group_pad = triton.next_power_of_2(heads // kv_heads)
    positions = max(1, tiling.rows // group_pad)
    if out is None:
        out = torch.empty((tokens, heads, dim), dtype=q.dtype, device=q.device)
    assert out.is_contiguous() and out.shape == q.shape
    num_rows, fp8 = lengths.shape[0], kv.dtype == E4M3
    if tokens == 0:
        return out
    prefill_kernel[(kv_heads, num_tiles(tokens, num_rows, positions))](
        out, q, kv, scales_or_layer(kv), tables, token_starts, lengths,
        num_rows, q.stride(0), out.stride(0), tables.stride(0), scale, window or NO_WINDOW,
        HEADS=heads, KV_HEADS=kv_heads, GROUP_PAD=group_pad,
        DIM=dim, DIM_PAD=triton.next_power_of_2(dim), BLOCK_SIZE=block_size,
        HEAD_STRIDE=head_stride(kv),
        POSITIONS=positions, TILE=tiling.tile,
        SOFT_CAP=soft_cap, FP8=fp8, WINDOWED=window > 0,
        WIDE=q.device.type == "cpu" and q.dtype == torch.bfloat16,
        num_warps=tiling.num_warps, num_stages=tiling.num_stages, enable_fp_fusion=True,
    )  # fmt: skip
    return out
