"""FP8 blocks: rounding is torch's, a row is its own, and kernels agree with the readable ones."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from phasewise.kernels import fp8
from phasewise.kernels.cpu_operators import GATHER_FROM, CpuOperators
from phasewise.kernels.fp8_rows import append_rows, gather_rows
from phasewise.kernels.openmp import HAS_OPENMP
from phasewise.kernels.torch_operators import TorchOperators
from phasewise.tests.kernels.fp8_layers import fp8_layer
from phasewise.tests.kernels.test_operators import SHAPES, SPANS, _close, _rows
from torch import Tensor

CPU = torch.device("cpu")
THREADS = [1, 3] if HAS_OPENMP else [1]
DTYPES = [torch.float32, torch.bfloat16]


def appended(rows: Tensor, *, by_numba: bool, threads: int = 1) -> tuple[Tensor, Tensor]:
    """Codes [rows, dim] and scale bytes [rows] of float32 or bfloat16 rows written as keys."""
    count, dim = rows.shape
    kv = fp8_layer(-(-count // 16), 1, 16, dim)
    slots = np.arange(count, dtype=np.int64)
    if by_numba:
        append_rows(rows.repeat(1, 3), kv, slots, threads)  # a query, a key, a value
    else:
        fp8.append(kv, rows[:, None], rows[:, None], torch.from_numpy(slots))
    codes = kv.view(torch.uint8)[:, 0, 0].flatten(0, 1)[:count]
    return codes, fp8.scales_of(kv)[:, 0, 0].flatten()[:count]


def boundaries() -> Tensor:
    """Every e4m3 value, every midpoint of two, and what lies next to either in float32."""
    codes = torch.arange(256, dtype=torch.uint8).view(fp8.E4M3).float()
    values = codes[codes.isfinite()].sort().values.unique()
    points = torch.cat((values, (values[1:] + values[:-1]) / 2))
    below, above = (points.nextafter(torch.full_like(points, s * torch.inf)) for s in (-1, 1))
    return torch.cat((points, below, above)).clamp(-448, 448)


@pytest.mark.parametrize("by_numba", [False, True])
def test_rounding_is_that_of_torch_at_every_value_and_boundary(by_numba: bool) -> None:
    points = boundaries()
    # 448 beside each fixes the scale at 1, so that the row shows the rounding alone.
    codes, scales = appended(
        torch.stack((points, torch.full_like(points, 448.0)), dim=1), by_numba=by_numba
    )
    assert (scales == 127).all()
    expected = points.to(fp8.E4M3).view(torch.uint8)
    assert torch.equal(codes[:, 0], expected)


@pytest.mark.parametrize("by_numba", [False, True])
def test_the_scale_is_the_smallest_power_of_two_that_does_not_saturate(by_numba: bool) -> None:
    just_above = torch.tensor(448.0).nextafter(torch.tensor(1e9)).item()
    largest = torch.tensor([448.0, just_above, 224.0, 1e-3, 3e38, 1e-45, 0.0])
    codes, scales = appended(largest[:, None] * torch.tensor([1.0, -0.5]), by_numba=by_numba)
    assert scales.tolist() == [127, 128, 126, 109, 247, 1, 1]
    back = fp8.dequantise(codes.view(fp8.E4M3), scales)[:5]
    torch.testing.assert_close(
        back, largest[:5, None] * torch.tensor([1.0, -0.5]), rtol=1 / 16, atol=0
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [1, 31, 80])
def test_numba_writes_the_reference_bytes(dim: int, dtype: torch.dtype) -> None:
    torch.manual_seed(dim)
    rows = torch.randn(300, dim) * 10 ** (6 * torch.randn(300, 1))
    rows[7], rows[8, 0], rows[9, -1] = 0, torch.inf, torch.nan
    for mine, theirs in zip(
        appended(rows.to(dtype), by_numba=True, threads=THREADS[-1]),
        appended(rows.to(dtype), by_numba=False),
        strict=True,
    ):
        assert torch.equal(mine, theirs)


def test_what_a_position_holds_depends_on_itself_alone() -> None:
    """Not on the step that wrote it, nor on louder neighbours in its block or its row of heads."""
    torch.manual_seed(0)
    k = torch.randn(8, 2, 20) * torch.logspace(-3, 3, 8)[:, None, None]
    whole, pieces = fp8_layer(1, 2, 8, 20), fp8_layer(1, 2, 8, 20)
    fp8.append(whole, k, k, torch.arange(8))
    for low, high in ((5, 8), (0, 1), (1, 5)):
        fp8.append(pieces, k[low:high], k[low:high], torch.arange(low, high))
    for view in (lambda kv: kv.view(torch.uint8), fp8.scales_of):
        assert torch.equal(view(whole), view(pieces))
    error = (fp8.gather(whole, torch.tensor([0]))[0, 0].transpose(0, 1) - k).abs()
    assert (error <= k.abs() / 16 + k.abs().amax(-1, keepdim=True) * 2.0**-17).all()


def test_a_row_that_is_not_finite_is_nan_and_its_neighbours_are_not() -> None:
    rows = torch.ones(3, 4)
    rows[1, 2] = torch.inf
    kv = fp8_layer(1, 1, 3, 4)
    fp8.append(kv, rows[:, None], rows[:, None], torch.arange(3))
    for dense in (
        fp8.gather(kv, torch.tensor([0]))[0, :, 0],
        gather_rows(kv, torch.tensor([0]), torch.float32, 1)[:, 0],
    ):
        assert dense[:, 1].isnan().all()
        assert (dense[:, [0, 2]] == 1).all()


def _filled(num_blocks: int, kv_heads: int, block_size: int, dim: int) -> Tensor:
    kv = fp8_layer(num_blocks, kv_heads, block_size, dim)
    count = num_blocks * block_size
    k, v = torch.randn(2, count, kv_heads, dim) * torch.logspace(-1, 1, count)[:, None, None]
    fp8.append(kv, k, v, torch.randperm(count))
    return kv


@pytest.mark.parametrize("threads", THREADS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_gathered_blocks_are_the_reference_values(
    shape: tuple[int, int, int, int], dtype: torch.dtype, threads: int
) -> None:
    _, kv_heads, dim, block_size = shape
    kv, blocks = _filled(9, kv_heads, block_size, dim), torch.tensor([8, 0, 3, 5, 1])
    expected = fp8.gather(kv, blocks).permute(1, 2, 0, 3, 4).flatten(2, 3)
    assert torch.equal(gather_rows(kv, blocks, dtype, threads).float(), expected)


@pytest.mark.parametrize("threads", THREADS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [0, 1, 17])
@pytest.mark.parametrize("shape", SHAPES)
def test_attention_over_fp8_blocks_equals_attention_over_their_values(
    shape: tuple[int, int, int, int], window: int, dtype: torch.dtype, threads: int
) -> None:
    heads, kv_heads, dim, block_size = shape
    torch.manual_seed(1)
    rows, num_blocks = _rows(block_size, SPANS)
    assert any(count >= GATHER_FROM for _, count in SPANS)
    kv = _filled(num_blocks, kv_heads, block_size, dim)
    dense = fp8.gather(kv, torch.arange(num_blocks))
    qkv = torch.randn(rows.num_tokens, (heads + 2 * kv_heads) * dim).to(dtype)
    angles = torch.from_numpy(rows.positions)
    truth = TorchOperators()
    plan = truth.plan(rows, angles, CPU)
    # The reference computes in float32: SDPA in bfloat16 rounds inside.
    expected = truth.attention(qkv.float(), dense, plan, window=window, scale=0.3)
    cpu = CpuOperators(dtype, dim, block_size, threads)
    mine = cpu.attention(qkv, kv, cpu.plan(rows, angles, CPU), window=window, scale=0.3)
    readable = truth.attention(qkv.float(), kv, plan, window=window, scale=0.3)
    torch.testing.assert_close(readable, expected)
    _close(mine / 8, expected / 8, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("rotated", [False, True])
def test_rope_and_append_quantise_what_a_plain_cache_would_hold(
    rotated: bool, normed: bool, dtype: torch.dtype
) -> None:
    heads, kv_heads, dim, block_size = 6, 2, 80, 8
    rows, num_blocks = _rows(block_size, SPANS)
    torch.manual_seed(2)
    qkv = torch.randn(rows.num_tokens, (heads + 2 * kv_heads) * dim).to(dtype)
    angle = torch.randn(300, dim // 2)
    table = torch.cat((angle.cos(), angle.sin()), dim=-1) if rotated else None
    norms = (torch.rand(dim).to(dtype), torch.rand(dim).to(dtype)) if normed else None
    slots = torch.from_numpy(rows.slots)
    for ops in (CpuOperators(dtype, dim, block_size, THREADS[-1]), TorchOperators()):
        plan = ops.plan(rows, torch.from_numpy(rows.positions), CPU)
        plain = torch.zeros(num_blocks, 2, kv_heads, block_size, dim, dtype=dtype)
        kv, expected = (fp8_layer(num_blocks, kv_heads, block_size, dim) for _ in range(2))
        queries = []
        for target in (plain, kv):
            own = qkv.clone()
            ops.rope_append(own, target, plan, table, norms, 1e-6)  # type: ignore[arg-type]
            queries.append(own[:, : heads * dim])
        block, offset = slots // block_size, slots % block_size
        fp8.append(expected, plain[block, 0, :, offset], plain[block, 1, :, offset], slots)
        assert torch.equal(*queries)
        assert torch.equal(kv.view(torch.uint8), expected.view(torch.uint8))
        assert torch.equal(fp8.scales_of(kv), fp8.scales_of(expected))
