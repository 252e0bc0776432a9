"""RMSNorm and LayerNorm of rows, with the residual sum before them. A program a row.

The readable versions are `kernels.reference.rms_norm` and `reference.layer_norm`.
"""

# What a kernel's values are, Triton's decorators hide from a type checker.
# pyright: reportCallIssue=false, reportArgumentType=false, reportOperatorIssue=false
# pyright: reportAttributeAccessIssue=false
# ruff: noqa: ANN001, ANN202
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _load_sum(x, residual, at, mask, ADDED: tl.constexpr):
    """x, or x + residual rounded to the residual's dtype and written there; in float32."""
    h = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    if ADDED:
        h += tl.load(residual + at, mask=mask, other=0.0).to(tl.float32)
        rounded = h.to(residual.dtype.element_ty)
        tl.store(residual + at, rounded, mask=mask)
        h = rounded.to(tl.float32)
    return h


@triton.jit
def rms_norm_kernel(
    out, x, residual, weight, eps, DIM: tl.constexpr, DIM_PAD: tl.constexpr, ADDED: tl.constexpr
) -> None:
    at = tl.program_id(0).to(tl.int64) * DIM + tl.arange(0, DIM_PAD)
    mask = tl.arange(0, DIM_PAD) < DIM
    h = _load_sum(x, residual, at, mask, ADDED)
    factor = tl.rsqrt(tl.sum(h * h, 0) / DIM + eps)
    kind = out.dtype.element_ty
    own = tl.load(weight + tl.arange(0, DIM_PAD), mask=mask, other=0.0).to(tl.float32)
    # Rounded before the weight is applied, where the model's own dtype rounds.
    tl.store(out + at, ((h * factor).to(kind).to(tl.float32) * own).to(kind), mask=mask)


@triton.jit
def layer_norm_kernel(
    out,
    x,
    residual,
    weight,
    bias,
    eps,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    ADDED: tl.constexpr,
) -> None:
    at = tl.program_id(0).to(tl.int64) * DIM + tl.arange(0, DIM_PAD)
    mask = tl.arange(0, DIM_PAD) < DIM
    h = _load_sum(x, residual, at, mask, ADDED)
    centred = tl.where(mask, h - tl.sum(h, 0) / DIM, 0.0)
    factor = tl.rsqrt(tl.sum(centred * centred, 0) / DIM + eps)
    own = tl.load(weight + tl.arange(0, DIM_PAD), mask=mask, other=0.0).to(tl.float32)
    shift = tl.load(bias + tl.arange(0, DIM_PAD), mask=mask, other=0.0).to(tl.float32)
    tl.store(out + at, (centred * factor * own + shift).to(out.dtype.element_ty), mask=mask)


def _num_warps(dim: int) -> int:
    """16 values a thread, so that two accesses of 16 bytes are in flight."""
    return max(1, min(16, triton.next_power_of_2(dim) // 512))


def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> Tensor:
    """RMSNorm of rows x [tokens, dim]; with `residual`, of x + residual, which replaces it."""
    assert x.is_contiguous() and (residual is None or residual.is_contiguous())
    out, dim = torch.empty_like(x), x.shape[-1]
    if x.numel():
        rms_norm_kernel[(x.numel() // dim,)](
            out,
            x,
            residual,
            weight,
            eps,
            DIM=dim,
            DIM_PAD=triton.next_power_of_2(dim),
            ADDED=residual is not None,
            num_warps=_num_warps(dim),
            enable_fp_fusion=False,
        )
    return out


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, residual: Tensor | None = None
) -> Tensor:
    """LayerNorm of rows x [tokens, dim]; with `residual`, of x + residual, which replaces it."""
    assert x.is_contiguous() and (residual is None or residual.is_contiguous())
    out, dim = torch.empty_like(x), x.shape[-1]
    if x.numel():
        layer_norm_kernel[(x.numel() // dim,)](
            out,
            x,
            residual,
            weight,
            bias,
            eps,
            DIM=dim,
            DIM_PAD=triton.next_power_of_2(dim),
            ADDED=residual is not None,
            num_warps=_num_warps(dim),
            enable_fp_fusion=False,
        )
    return out
