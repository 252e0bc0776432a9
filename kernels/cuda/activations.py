"""What stands between the two matrix products of a feed-forward layer.

The readable versions are `kernels.reference.silu_mul` and `torch.relu`.
"""

# What a kernel's values are, Triton's decorators hide from a type checker.
# pyright: reportCallIssue=false, reportArgumentType=false, reportOperatorIssue=false
# pyright: reportAttributeAccessIssue=false
# ruff: noqa: ANN001
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_TILE = 1024  # columns a program takes: an access of 16 bytes a thread for gate and for up


@triton.jit
def silu_mul_kernel(out, gate_up, stride, DIM: tl.constexpr, TILE: tl.constexpr) -> None:
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * TILE + tl.arange(0, TILE)
    mask = column < DIM
    kind = out.dtype.element_ty
    gate = tl.load(gate_up + row * stride + column, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * stride + DIM + column, mask=mask, other=0.0).to(tl.float32)
    silu = (gate / (1 + tl.exp(-gate))).to(kind).to(tl.float32)
    tl.store(out + row * DIM + column, (silu * up).to(kind), mask=mask)


@triton.jit
def relu_kernel(out, x, size, TILE: tl.constexpr) -> None:
    at = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    value = tl.load(x + at, mask=at < size, other=0.0)
    # Not a maximum: NaN stays NaN, as in torch.
    tl.store(out + at, tl.where(value.to(tl.float32) < 0, 0.0, value), mask=at < size)


def silu_mul(gate_up: Tensor) -> Tensor:
    """silu(gate) * up [tokens, dim] for rows of [gate, up] [tokens, 2 dim]."""
    tokens, width = gate_up.shape
    dim = width // 2
    assert gate_up.stride(1) == 1
    out = gate_up.new_empty((tokens, dim))
    if out.numel():
        silu_mul_kernel[(tokens, triton.cdiv(dim, _TILE))](
            out,
            gate_up,
            gate_up.stride(0),
            DIM=dim,
            TILE=_TILE,
            num_warps=4,
            enable_fp_fusion=False,
        )
    return out


def relu(x: Tensor) -> Tensor:
    """max(x, 0) of a contiguous tensor."""
    assert x.is_contiguous()
    out = torch.empty_like(x)
    if x.numel():
        relu_kernel[(triton.cdiv(x.numel(), _TILE),)](
            out, x, x.numel(), TILE=_TILE, num_warps=4, enable_fp_fusion=False
        )
    return out
