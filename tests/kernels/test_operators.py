"""Every Numba kernel agrees with its torch reference over odd shapes, threads and dtypes."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from phasewise.kernels.cpu_operators import GATHER_FROM, CpuOperators
from phasewise.kernels.openmp import HAS_OPENMP
from phasewise.kernels.rows import Rows, rows_of
from phasewise.kernels.torch_operators import TorchOperators

CPU = torch.device("cpu")
THREADS = [1, 3] if HAS_OPENMP else [1]
DTYPES = [torch.float32, torch.bfloat16]
# heads, KV heads, head_dim, block_size
SHAPES = [(3, 1, 10, 16), (4, 4, 64, 16), (6, 2, 80, 8), (8, 2, 31, 5), (1, 1, 2, 1)]


def _close(mine: torch.Tensor, theirs: torch.Tensor, dtype: torch.dtype) -> None:
    tolerance = 2e-5 if dtype == torch.float32 else 3e-2  # bfloat16: a few roundings of 2^-8
    torch.testing.assert_close(mine.float(), theirs.float(), rtol=tolerance, atol=tolerance)


def _rows(block_size: int, spans: list[tuple[int, int]], seed: int = 0) -> tuple[Rows, int]:
    """Rows of (start, count) with scattered tables, and how many blocks there are."""
    needed = [-(-(start + count) // block_size) for start, count in spans]
    ids = list(range(sum(needed) + 5))
    random.Random(seed).shuffle(ids)
    tables = np.zeros((len(spans), max(needed)), dtype=np.int32)
    for row, count in enumerate(needed):
        tables[row, :count] = [ids.pop() for _ in range(count)]
    starts, counts = (np.array(column, dtype=np.int64) for column in zip(*spans, strict=True))
    return rows_of(starts, counts, tables, block_size), sum(needed) + 5


SPANS = [(0, 1), (15, 1), (16, 1), (200, 1), (0, 3), (30, 7), (0, GATHER_FROM), (19, 45)]


@pytest.mark.parametrize("threads", THREADS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [0, 1, 17])
@pytest.mark.parametrize("shape", SHAPES)
def test_attention_in_place_equals_gathered_attention(
    shape: tuple[int, int, int, int], window: int, dtype: torch.dtype, threads: int
) -> None:
    heads, kv_heads, dim, block_size = shape
    rows, num_blocks = _rows(block_size, SPANS)
    torch.manual_seed(1)
    kv = torch.randn(num_blocks, 2, kv_heads, block_size, dim).to(dtype)
    qkv = torch.randn(rows.num_tokens, (heads + 2 * kv_heads) * dim).to(dtype)
    angles = torch.from_numpy(rows.positions)
    cpu, reference = CpuOperators(dtype, dim, block_size, threads), TorchOperators()
    mine = cpu.attention(qkv, kv, cpu.plan(rows, angles, CPU), window=window, scale=0.3)
    plan = reference.plan(rows, angles, CPU)
    # The reference computes in float32: SDPA in bfloat16 rounds inside.
    theirs = reference.attention(qkv.float(), kv.float(), plan, window=window, scale=0.3)
    _close(mine, theirs, dtype)


@pytest.mark.parametrize("window", [0, 1, 17])
def test_gathered_attention_equals_the_formula(window: int) -> None:
    rows, num_blocks = _rows(8, SPANS)
    kv = torch.randn(num_blocks, 2, 2, 8, 6, dtype=torch.float64)
    qkv = torch.randn(rows.num_tokens, (4 + 4) * 6, dtype=torch.float64)
    reference = TorchOperators()
    plan = reference.plan(rows, torch.from_numpy(rows.positions), CPU)
    out = reference.attention(qkv, kv, plan, window=window, scale=0.3).view(-1, 4, 6)
    for token, (row, position) in enumerate(zip(rows.row_of, rows.positions, strict=True)):
        low = max(0, position + 1 - window) if window else 0
        seen = range(low, position + 1)
        at = [(rows.tables[row, j // 8], j % 8) for j in seen]
        for head in range(4):
            k = torch.stack([kv[block, 0, head // 2, offset] for block, offset in at])
            v = torch.stack([kv[block, 1, head // 2, offset] for block, offset in at])
            weights = torch.softmax(k @ qkv[token].view(8, 6)[head] * 0.3, dim=0)
            torch.testing.assert_close(out[token, head], weights @ v)


@pytest.mark.parametrize("threads", THREADS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("rotated", [False, True])
@pytest.mark.parametrize("shape", [s for s in SHAPES if s[2] % 2 == 0])
def test_rope_and_append_write_q_and_the_blocks_alike(
    shape: tuple[int, int, int, int], rotated: bool, normed: bool, dtype: torch.dtype, threads: int
) -> None:
    heads, kv_heads, dim, block_size = shape
    rows, num_blocks = _rows(block_size, SPANS)
    torch.manual_seed(2)
    kv = torch.randn(num_blocks, 2, kv_heads, block_size, dim).to(dtype)
    qkv = torch.randn(rows.num_tokens, (heads + 2 * kv_heads) * dim).to(dtype)
    angle = torch.randn(300, dim // 2)
    table = torch.cat((angle.cos(), angle.sin()), dim=-1) if rotated else None
    norms = (torch.rand(dim).to(dtype), torch.rand(dim).to(dtype)) if normed else None
    results = []
    for ops in (CpuOperators(dtype, dim, block_size, threads), TorchOperators()):
        own_qkv, own_kv = qkv.clone(), kv.clone()
        plan = ops.plan(rows, torch.from_numpy(rows.positions), CPU)
        ops.rope_append(own_qkv, own_kv, plan, table, norms, 1e-6)  # type: ignore[arg-type]
        results.append((own_qkv[:, : heads * dim], own_kv))
    for mine, theirs in zip(*results, strict=True):
        _close(mine, theirs, dtype)


@pytest.mark.parametrize("threads", THREADS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_rows", "dim"), [(1, 1), (2, 15), (7, 48), (33, 70)])
def test_rowwise_steps_equal_the_reference(
    num_rows: int, dim: int, dtype: torch.dtype, threads: int
) -> None:
    torch.manual_seed(3)
    x, weight = torch.randn(num_rows, dim).to(dtype), torch.rand(dim).to(dtype)
    residual = torch.randn(num_rows, dim).to(dtype)
    gate_up = 20 * torch.randn(num_rows, 2 * dim).to(dtype)
    cpu, reference = CpuOperators(dtype, 2, 16, threads), TorchOperators()
    _close(cpu.rms_norm(x, weight, 1e-5), reference.rms_norm(x, weight, 1e-5), dtype)
    mine, theirs = residual.clone(), residual.clone()
    summed = cpu.rms_norm(x, weight, 1e-5, mine)
    _close(summed, reference.rms_norm(x, weight, 1e-5, theirs), dtype)
    _close(mine, theirs, dtype)
    _close(cpu.silu_mul(gate_up), reference.silu_mul(gate_up), dtype)


def test_extreme_scores_neither_overflow_nor_leave_nan() -> None:
    rows, num_blocks = _rows(16, [(40, 1)])
    kv = torch.full((num_blocks, 2, 1, 16, 16), 1e4)
    qkv = torch.full((1, 3 * 16), 1e4)
    cpu = CpuOperators(torch.float32, 16, 16, 1)
    plan = cpu.plan(rows, torch.from_numpy(rows.positions), CPU)
    out = cpu.attention(qkv, kv, plan, window=0, scale=1.0)
    torch.testing.assert_close(out, torch.full_like(out, 1e4))
