"""What this GPU measurably can; later sections are held against it."""

from __future__ import annotations

from dataclasses import asdict

import torch

from .bench import Bench
from .measure import ceilings


def run(bench: Bench) -> None:
    if bench.dry:
        bench.skip("copy and matrix product", "a CPU's say nothing of a GPU's kernels")
        return
    found = asdict(ceilings())
    name = torch.cuda.get_device_name()
    bench.add("copy, read + write", found["copy_tb_s"], "TB/s", chip=name, **found)
    bench.add("bfloat16 product of 8,192 squared", found["matmul_tflop_s"], "TFLOP/s")
