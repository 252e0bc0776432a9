"""What each kernel achieves, as a share of the ceilings and beside torch's own."""

from __future__ import annotations

from dataclasses import replace

import torch

from .attention_cases import decode_case, prefill_case
from .bench import Bench, Target
from .case import TINY, Device
from .kernel_cases import timed_cases
from .measure import timing

# Decode attention of 64 rows over 2,048 positions, in TB/s: what other engines' kernels imply.
_DECODE = Target(must=3.2, good=3.8, smaller=False)
_DECODE_CASE = "decode attention, 64 x 2048"


def run(bench: Bench) -> None:
    on = Device.of(bench.device, bench.dtype)
    if bench.dry:
        bench.skip("times", "an interpreter has none; the peers' calls are tried")
        for case in (decode_case(on, TINY), prefill_case(on, replace(TINY, chunk=TINY.length))):
            for call in case.peers.values():
                call()
        return
    for case in timed_cases(on):
        figures = timing(case, bench.limits)
        is_bandwidth = "tb_s" in figures and not case.flops or case.name.startswith("decode")
        value, unit = (figures.pop("tb_s"), "TB/s") if is_bandwidth else (None, "")
        if value is None and "tflop_s" in figures:
            value, unit = figures.pop("tflop_s"), "TFLOP/s"
        target = _DECODE if case.name.startswith(_DECODE_CASE) else None
        bench.add(case.name, value, unit, target, **figures)
        torch.cuda.empty_cache()
        if bench.left_s < 5:
            bench.skip("further shapes", "this section's time is up")
            return
