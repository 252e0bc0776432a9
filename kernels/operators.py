"""The steps of a model that are not matrix products, for one device; chosen once, by `operators`.

All classes have the same methods and leave the same results within rounding. A caller makes a
plan per step and passes it to each layer's calls.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from .cpu_operators import CpuOperators, CpuPlan
from .torch_operators import TorchOperators, TorchPlan

if TYPE_CHECKING:
    from .cuda.operators import CudaOperators, CudaPlan

    Operators = CpuOperators | TorchOperators | CudaOperators
    Plan = CpuPlan | TorchPlan | CudaPlan


def operators(
    *, device: torch.device, dtype: torch.dtype, head_dim: int, block_size: int, threads: int
) -> Operators:
    """Numba on CPU in float32 and bfloat16, torch's own there in float16; Triton on CUDA."""
    if device.type == "cuda":
        from .cuda.operators import CudaOperators  # Triton, where there is a GPU

        return CudaOperators(torch.cuda.get_device_properties(device).multi_processor_count)
    if device.type == "cpu" and dtype in (torch.float32, torch.bfloat16):
        return CpuOperators(dtype, head_dim, block_size, threads)
    return TorchOperators()
