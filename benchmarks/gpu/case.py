"""What a kernel's case is, and at which sizes.

A case can be built at any size: large to be timed, small to be checked against float64, tiny to be
run by Triton's interpreter without a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

BLOCK_SIZE = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class Sizes:
    rows: int = 64
    length: int = 2048
    chunk: int = 2048
    tokens: int = 8192
    heads: int = 32
    kv_heads: int = 8
    dim: int = 128
    hidden: int = 4096
    ffn: int = 14336
    vocab: int = 128_256
    layers: int = 32
    experts: int = 8


TINY = Sizes(
    rows=2, length=40, chunk=24, tokens=5, heads=4, kv_heads=2, dim=64, hidden=96, ffn=80,
    vocab=300, layers=2, experts=3,
)  # fmt: skip
CHECKED = Sizes(rows=3, length=700, chunk=300, tokens=200, ffn=1792, layers=2)


def itself(result: Tensor) -> Tensor:
    return result


@dataclass(frozen=True, kw_only=True)
class Case:
    """One kernel on one shape. `compared(run())` should be `truth()`."""

    name: str
    run: Callable[[], Tensor]
    truth: Callable[[], Tensor]
    compared: Callable[[Tensor], Tensor] = itself  # kept out of the time
    tolerance: float  # of the largest difference, over the largest true value
    num_bytes: int = 0  # that must be read and written
    flops: int = 0
    peers: dict[str, Callable[[], Any]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class Device:
    device: torch.device
    dtype: torch.dtype
    multiprocessors: int

    @classmethod
    def of(cls, device: torch.device, dtype: torch.dtype) -> Device:
        """The GPU, or a CPU that plays one of two multiprocessors."""
        count = 2
        if device.type == "cuda":
            count = torch.cuda.get_device_properties(device).multi_processor_count
        return cls(device=device, dtype=dtype, multiprocessors=count)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, device=self.device, dtype=torch.float32).to(self.dtype)
