"""Other tilings of both attention kernels, on the GPU at hand.

python benchmarks/gpu/sweep.py
"""

from __future__ import annotations

import json
import sys

import torch
from phasewise.benchmarks.gpu.case import Device
from phasewise.benchmarks.gpu.kernel_cases import sweep_cases
from phasewise.benchmarks.gpu.measure import ceilings, timing
from triton.runtime.errors import OutOfResources


def main() -> int:
    if not torch.cuda.is_available():
        print("no GPU here", file=sys.stderr)
        return 2
    limits = ceilings()
    on = Device.of(torch.device("cuda"), torch.bfloat16)
    for name, build in sweep_cases(on):
        case = build()
        case.peers.clear()
        try:
            row = timing(case, limits)
        except OutOfResources as error:
            row = {"not run": str(error)}
        print(json.dumps({"tiling": name, **row}), flush=True)
        torch.cuda.empty_cache()
    return 0


if __name__ == "__main__":
    sys.exit(main())
