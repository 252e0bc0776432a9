"""Weights laid out for the CPU give the products of plain ones."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from phasewise.kernels.linear import linear, packed


@pytest.mark.parametrize("rows", [1, 3, 17, 64, 200])
@pytest.mark.parametrize(("outs", "ins"), [(16, 16), (70, 33), (512, 256), (1, 64)])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_packed_weights_multiply_as_plain_ones(
    rows: int, outs: int, ins: int, has_bias: bool, dtype: torch.dtype
) -> None:
    draw = torch.Generator().manual_seed(rows * outs)
    x = torch.randn(rows, ins, generator=draw).to(dtype)
    weight = torch.randn(outs, ins, generator=draw).to(dtype)
    bias = torch.randn(outs, generator=draw).to(dtype) if has_bias else None
    with torch.inference_mode():
        out = linear(x, packed(weight), bias)
    wide = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    assert out.dtype == dtype
    rounding = 2**-8 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(out.double(), wide, rtol=2 * rounding, atol=4 * rounding)


def test_float32_and_stacked_weights_stay_plain() -> None:
    for weight in (torch.zeros(8, 8), torch.zeros(2, 8, 8, dtype=torch.bfloat16)):
        assert packed(weight) is weight
