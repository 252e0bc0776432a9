"""Norms, activations, appends and expert products agree with the readable versions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from phasewise.kernels import fp8
from phasewise.kernels import reference as shared
from phasewise.kernels.cuda import activations, append, experts, norms, reference
from phasewise.tests.kernels.fp8_layers import fp8_layer
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
    interpreted(append.rope_append, qkv, kv, slots, positions, angles, **options)
    close(qkv.view(3, -1, dim)[:, :heads], q)
    close(kv, expected)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_an_fp8_append_writes_the_reference_bytes(
    interpreted: Any, dtype: torch.dtype, fused: bool
) -> None:
    """Loud and quiet rows, zeros, inf and NaN; padding writes nothing."""
    heads, kv_heads, dim, tokens = 4, 2, 80, 7
    qkv = normal(tokens, heads + 2 * kv_heads, dim, dtype=dtype)
    qkv *= torch.logspace(-4, 3, tokens, dtype=dtype)[:, None, None]
    qkv[2, -1], qkv[3, -2, 5], qkv[4, heads, 79] = 0, torch.inf, torch.nan
    slots = torch.tensor([5, -1, 9, 4, 0, 2, 11])
    q, k, v = qkv.clone().split((heads, kv_heads, kv_heads), dim=1)
    kv, expected = (fp8_layer(3, kv_heads, 4, dim) for _ in range(2))
    angles = torch.cat((torch.full((1, dim // 2), 0.6), torch.full((1, dim // 2), 0.8)), dim=1)
    if fused:
        k = shared.rotate(k, angles.expand(tokens, -1))
        options = {"heads": heads, "kv_heads": kv_heads}
        positions = torch.zeros(tokens, dtype=torch.int64)
        flat = qkv.flatten(1)
        interpreted(append.rope_append, flat, kv, slots, positions, angles, **options)
        close(flat.view(tokens, -1, dim)[:, :heads], shared.rotate(q, angles.expand(tokens, -1)))
    else:
        interpreted(append.append, kv, k, v, slots)
    live = slots >= 0
    shared.append(expected, k[live], v[live], slots[live])
    assert torch.equal(kv.view(torch.uint8), expected.view(torch.uint8))
    assert torch.equal(fp8.scales_of(kv), fp8.scales_of(expected))


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
