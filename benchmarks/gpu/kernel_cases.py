"""What is checked, timed and swept: every kernel on Llama-3.1-8B's shapes, experts on Mixtral's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from phasewise.kernels.cuda.decode_attention import DecodeTiling
from phasewise.kernels.cuda.prefill_attention import PrefillTiling

from .attention_cases import decode_case, prefill_case
from .case import Case, Device, Sizes
from .row_cases import (
    append_cases,
    expert_case,
    row_cases,
    sampling_cases,
    transfer_cases,
)


def checked_cases(on: Device, sizes: Sizes) -> Iterator[Case]:
    """Every kernel once, at `sizes`."""
    for fp8 in (False, True):
        yield decode_case(on, sizes, fp8=fp8)
        yield decode_case(on, replace(sizes, rows=1), fp8=fp8)
        yield prefill_case(on, sizes, fp8=fp8)
    yield from append_cases(on, sizes)
    yield from transfer_cases(on, sizes)
    yield from row_cases(on, sizes)
    yield from sampling_cases(on, sizes)
    yield expert_case(on, sizes, sizes.tokens)


def timed_cases(on: Device) -> Iterator[Case]:
    """The shapes whose speed counts."""
    sizes = Sizes()
    for rows in (1, 8, 64, 256):
        yield decode_case(on, replace(sizes, rows=rows))
    yield decode_case(on, sizes, fp8=True)
    for chunk, length in ((2048, 2048), (8192, 8192), (2048, 8192)):
        yield prefill_case(on, replace(sizes, chunk=chunk, length=length))
    yield prefill_case(on, replace(sizes, chunk=8192, length=8192), fp8=True)
    yield from append_cases(on, sizes)
    yield from transfer_cases(on, sizes)
    yield from row_cases(on, sizes)
    yield from sampling_cases(on, sizes)
    for tokens in (64, 4096):
        yield expert_case(on, sizes, tokens)


def sweep_cases(on: Device) -> Iterator[tuple[str, Callable[[], Case]]]:
    """Other tilings of both attention kernels, to be built one at a time."""
    sizes = Sizes()
    for tile in (32, 64, 128):
        for stages in (3, 4, 5):
            for warps in (4, 8):
                decode = DecodeTiling(tile=tile, num_warps=warps, num_stages=stages)
                yield str(decode), lambda tiling=decode: decode_case(on, sizes, tiling=tiling)
    whole = replace(sizes, chunk=8192, length=8192)
    for rows, tile, warps in ((128, 64, 8), (128, 128, 8), (64, 64, 4), (64, 128, 4)):
        for stages in (2, 3):
            prefill = PrefillTiling(rows=rows, tile=tile, num_warps=warps, num_stages=stages)
            yield str(prefill), lambda tiling=prefill: prefill_case(on, whole, tiling=tiling)
