"""The steps of a model that are not matrix products, for one device; chosen once, by `operators`.

Both classes have the same methods and leave the same results within rounding. A caller makes a
plan per step and passes it to each layer's calls.
"""

from __future__ import annotations

import torch

from .cpu_operators import CpuOperators, CpuPlan
from .torch_operators import TorchOperators, TorchPlan

Operators = CpuOperators | TorchOperators
Plan = CpuPlan | TorchPlan


def operators(
    *, device: torch.device, dtype: torch.dtype, head_dim: int, block_size: int, threads: int
) -> Operators:
    """Numba on CPU in float32 and bfloat16; torch's own on CUDA and in float16."""
    if device.type == "cpu" and dtype in (torch.float32, torch.bfloat16):
        return CpuOperators(dtype, head_dim, block_size, threads)
    return TorchOperators()
