"""Norms, activations, appends and expert products agree with the readable versions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from phasewise.kernels import reference as shared
from phasewise.kernels.cuda import activations, append, experts, norms, reference
from torch import Tensor

HALVES = [torch.float32, torch.float16, torch.bfloat16]
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def close(actual: Tensor, expected: Tensor) -> None:
    assert actual.dtype == expected.dtype
    tolerance = TOLERANCE[actual.dtype]
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("added", [False, True])
def test_norms_agree_with_and_without_a_residual(
    interpreted: Any, dtype: torch.dtype, added: bool
) -> None:
    dim = 80
    x, weight, bias = (normal(3, dim, dtype=dtype), *normal(2, dim, dtype=dtype, seed=1))
    residual = normal(3, dim, dtype=dtype, seed=2) if added else None
    h = x if residual is None else x + residual
    for kernel, truth, weights in (
        (norms.rms_norm, shared.rms_norm, (weight,)),
        (norms.layer_norm, reference.layer_norm, (weight, bias)),
    ):
        own = None if residual is None else residual.clone()
        close(interpreted(kernel, x, *weights, 1e-5, own), truth(h, *weights, 1e-5))
        if own is not None:
            close(own, h)


def test_norms_and_activations_of_no_rows_are_no_rows(interpreted: Any) -> None:
    empty, weight = torch.empty(0, 8), torch.ones(8)
    assert interpreted(norms.rms_norm, empty, weight, 1e-5).shape == (0, 8)
    assert interpreted(norms.layer_norm, empty, weight, weight, 1e-5).shape == (0, 8)
    assert interpreted(activations.silu_mul, empty).shape == (0, 4)
    assert interpreted(activations.relu, empty).shape == (0, 8)


@pytest.mark.parametrize("dtype", HALVES)
def test_activations_agree(interpreted: Any, dtype: torch.dtype) -> None:
    gate_up = normal(3, 2 * 88, dtype=dtype) * 10
    close(interpreted(activations.silu_mul, gate_up), shared.silu_mul(gate_up))
    x = normal(2, 600, dtype=dtype)
    x[0, 5] = torch.nan
    assert torch.equal(interpreted(activations.relu, x).nan_to_num(7), torch.relu(x).nan_to_num(7))


@pytest.mark.parametrize(("kv_heads", "dim"), [(1, 64), (3, 80), (2, 256)])
def test_append_writes_the_slots_and_nothing_else(
    interpreted: Any, kv_heads: int, dim: int
) -> None:
    slots = torch.tensor([13, 2, -1, 0])  # the third is padding
    k, v = normal(4, 3 * kv_heads, dim)[:, kv_heads:].split(kv_heads, dim=1)
    kv = normal(4, 2, kv_heads, 4, dim, seed=3)
    expected = kv.clone()
    kept = slots >= 0
    shared.append(expected, k[kept], v[kept], slots[kept])
    interpreted(append.append, kv, k, v, slots)
    assert torch.equal(kv, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(4, 4, 64), (6, 2, 80), (7, 1, 96)])
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("rotated", [False, True])
def test_fused_append_is_norm_then_rotation_then_append(
    interpreted: Any,
    heads: int,
    kv_heads: int,
    dim: int,
    dtype: torch.dtype,
    normed: bool,
    rotated: bool,
) -> None:
    slots, positions = torch.tensor([5, -1, 9]), torch.tensor([3, 0, 30])
    qkv = normal(3, (heads + 2 * kv_heads) * dim, dtype=dtype)
    weights = normal(2, dim, dtype=dtype, seed=1) if normed else (None, None)
    turns = torch.arange(31)[:, None] * 10.0 ** -torch.linspace(0, 3, dim // 2)
    angles = torch.cat((turns.cos(), turns.sin()), dim=1) if rotated else None
    q, k, v = qkv.view(3, -1, dim).clone().split((heads, kv_heads, kv_heads), dim=1)
    if normed:
        q, k = (shared.rms_norm(x, w, 1e-6) for x, w in zip((q, k), weights, strict=True))
    if angles is not None:
        q, k = (shared.rotate(x, angles[positions]) for x in (q, k))
    kv = torch.zeros(3, 2, kv_heads, 4, dim, dtype=dtype)
    expected = kv.clone()
    shared.append(expected, k[[0, 2]], v[[0, 2]], slots[[0, 2]])
    options = {"heads": heads, "kv_heads": kv_heads, "eps": 1e-6}
    options |= {"q_weight": weights[0], "k_weight": weights[1]}
    in_place = qkv.clone()
    interpreted(append.rope_append, qkv, kv, slots, positions, angles, **options)
    close(qkv.view(3, -1, dim)[:, :heads], q)
    close(kv, expected)
    if rotated:  # without a pool, keys stay where they are
        interpreted(append.rope_append, in_place, None, slots, positions, angles, **options)
        close(in_place.view(3, -1, dim)[:, : heads + kv_heads], torch.cat((q, k), dim=1))


def test_fp8_append_quantises_and_grows_a_block_scale(interpreted: Any) -> None:
    kv_heads, dim, size = 2, 80, 4
    tables = torch.tensor([[5, 2, 7], [1, 3, -1], [0, -1, -1]], dtype=torch.int32)
    kv = torch.zeros(8, 2, kv_heads, size, dim).to(torch.float8_e4m3fn)
    scales = torch.full((8, 2, kv_heads), 2.0**60)  # of the blocks' former tenants
    expected = (kv.clone(), scales.clone())
    source = normal(16, 2, kv_heads, dim)
    source[3:] *= 1000  # louder than what the block holds by then
    source[15] = 0
    # Three steps: row 0 fills a block and starts another, then goes on in it; row 2 ends silent.
    steps = [([3, 0, 0], [3, 0, 0]), ([6, 2, 0], [9, 2, 0]), ([1, 1, 1], [10, 3, 1])]
    used = 0
    for counts, lengths in steps:
        k, v = source[used : used + sum(counts)].unbind(dim=1)
        used += sum(counts)
        rows = (
            tables,
            torch.tensor([0, *torch.tensor(counts).cumsum(0).tolist()], dtype=torch.int32),
            torch.tensor(lengths, dtype=torch.int32),
        )
        interpreted(append.append_fp8, kv, scales, k, v, *rows, max_count=max(counts))
        reference.append_fp8(*expected, k, v, *rows)
    assert torch.equal(scales, expected[1])
    assert torch.equal(kv.float(), expected[0].float())
    assert scales[[5, 2, 7, 1, 0]].max() < 2.0**60


def test_what_an_fp8_block_holds_does_not_depend_on_the_steps_it_came_in() -> None:
    tables, starts = torch.tensor([[0]], dtype=torch.int32), torch.tensor([0, 8]).int()
    k = normal(8, 1, 64) * torch.logspace(-1, 1, 8)[:, None, None]
    pools = []
    for cuts in ([0, 8], [0, 3, 4, 8]):
        kv, scales = torch.zeros(1, 2, 1, 8, 64).to(torch.float8_e4m3fn), torch.zeros(1, 2, 1)
        for low, high in zip(cuts, cuts[1:], strict=False):
            starts, length = torch.tensor([0, high - low]).int(), torch.tensor([high]).int()
            reference.append_fp8(kv, scales, k[low:high], k[low:high], tables, starts, length)
        pools.append((reference.dequantise(kv, scales), scales))
    assert torch.equal(pools[0][1], pools[1][1])
    smallest = pools[0][1].max().item() * 2.0**-9  # a step among the subnormals
    assert (pools[0][0] - pools[1][0]).abs().max() <= smallest


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_expert_products_agree_though_experts_are_empty(
    interpreted: Any, dtype: torch.dtype
) -> None:
    x, weights = normal(9, 40, dtype=dtype), normal(4, 24, 40, dtype=dtype, seed=1)
    starts = torch.tensor([0, 0, 19, 19, 20], dtype=torch.int32)
    rows = torch.randint(0, 9, (20,), dtype=torch.int32)
    factors = normal(20, seed=2)
    tiling = experts.ExpertTiling(slots=16, columns=16, depth=16, num_warps=4, num_stages=1)
    plain = interpreted(experts.grouped_matmul, x, weights, rows, starts, tiling=tiling)
    truth = reference.grouped_matmul(x, weights, rows, starts)
    close(plain / 8, truth / 8)
    scaled = interpreted(
        experts.grouped_matmul, x, weights, rows, starts, factors=factors, tiling=tiling
    )
    close(scaled / 8, (truth.float() * factors[:, None]).to(dtype) / 8)
