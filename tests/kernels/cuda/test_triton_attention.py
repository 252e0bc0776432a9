"""Both attention kernels agree with the readable one, over the shapes a server meets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from phasewise.kernels import reference as shared
from phasewise.kernels.cuda import reference
from phasewise.kernels.cuda.decode_attention import DecodeTiling, decode_attention, splits_for
from phasewise.kernels.cuda.prefill_attention import PrefillTiling, prefill_attention
from phasewise.tests.kernels.fp8_layers import fp8_layer
from torch import Tensor

SMALL_DECODE = DecodeTiling(tile=16, num_warps=4, num_stages=1)
SMALL_PREFILL = PrefillTiling(rows=16, tile=16, num_warps=4, num_stages=1)
TOLERANCE = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


@dataclass(frozen=True, kw_only=True)
class Rows:
    q: Tensor
    kv: Tensor
    tables: Tensor
    token_starts: Tensor
    lengths: Tensor

    def args(self) -> tuple[Tensor, ...]:
        return self.q, self.kv, self.tables, self.token_starts, self.lengths


def make_rows(
    counts: list[int],
    lengths: list[int],
    *,
    heads: int,
    kv_heads: int,
    dim: int,
    block_size: int = 4,
    dtype: torch.dtype = torch.float32,
    window: int = 0,
) -> Rows:
    """Rows over scattered blocks. All that no query may see is NaN, all dead entries are -1."""
    generator = torch.Generator().manual_seed(sum(lengths) + heads + dim)
    width = max(1, -(-max(lengths) // block_size))
    num_blocks = len(lengths) * width + 2
    kv = torch.full((num_blocks, 2, kv_heads, block_size, dim), torch.nan)
    tables = torch.full((len(lengths), width + 1), -1, dtype=torch.int32)
    order = iter(torch.randperm(num_blocks, generator=generator).tolist())
    for row, (count, length) in enumerate(zip(counts, lengths, strict=True)):
        visible = max(0, length - count + 1 - window) if window else 0
        for index in range(visible // block_size, -(-length // block_size)):
            low, high = index * block_size, min(length, (index + 1) * block_size)
            tables[row, index] = block = next(order)
            kept = slice(max(visible - low, 0), high - low)
            kv[block, :, :, kept] = torch.randn(
                2, kv_heads, kept.stop - kept.start, dim, generator=generator
            )
    tokens = sum(counts)
    qkv = torch.randn(tokens, heads + 2 * kv_heads, dim, generator=generator)
    return Rows(
        q=qkv.to(dtype)[:, :heads],  # strided, as a view of the fused projection is
        kv=kv.to(dtype),
        tables=tables,
        token_starts=torch.tensor([0, *torch.tensor(counts).cumsum(0).tolist()], dtype=torch.int32),
        lengths=torch.tensor(lengths, dtype=torch.int32),
    )


def check(actual: Tensor, rows: Rows, **options: Any) -> None:
    expected = reference.attend_rows(*rows.args(), **options)
    tolerance = TOLERANCE[actual.dtype]
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=tolerance)


DECODE_SHAPES = [
    # heads, kv_heads, dim, dtype, options
    (1, 1, 64, torch.float32, {}),
    (6, 2, 80, torch.float32, {"window": 7}),
    (5, 1, 96, torch.float32, {"soft_cap": 2.0}),
    (8, 1, 128, torch.float16, {}),
    (12, 3, 64, torch.float32, {}),
    (6, 1, 64, torch.float32, {"window": 1}),
    (4, 2, 128, torch.bfloat16, {"window": 9}),
    (7, 1, 256, torch.float32, {"soft_cap": 1.0, "window": 5}),
]


@pytest.mark.parametrize("num_splits", [1, 3])
@pytest.mark.parametrize(("heads", "kv_heads", "dim", "dtype", "options"), DECODE_SHAPES)
def test_decode_attention_agrees_whatever_the_heads_and_the_splits(
    interpreted: Any,
    heads: int,
    kv_heads: int,
    dim: int,
    dtype: torch.dtype,
    options: dict[str, Any],
    num_splits: int,
) -> None:
    options = {"scale": dim**-0.5, **options}
    # An empty row, one token, a full block, and more tiles than there are splits.
    lengths, window = [0, 1, 4, 39], options.get("window", 0)
    counts = [min(1, n) for n in lengths]
    rows = make_rows(
        counts, lengths, heads=heads, kv_heads=kv_heads, dim=dim, dtype=dtype, window=window
    )
    # Decode takes a query a row; the empty row's is never looked at.
    q = torch.cat((rows.q[:1], rows.q))
    actual = interpreted(
        decode_attention,
        q,
        rows.kv,
        rows.tables,
        rows.lengths,
        num_splits=num_splits,
        tiling=SMALL_DECODE,
        **options,
    )
    assert not actual[0].any()
    check(actual[1:], rows, **options)


def test_a_tile_of_decode_may_be_narrower_or_wider_than_a_block(interpreted: Any) -> None:
    for block_size in (3, 32):
        rows = make_rows([1], [50], heads=2, kv_heads=1, dim=64, block_size=block_size)
        actual = interpreted(
            decode_attention,
            rows.q,
            rows.kv,
            rows.tables,
            rows.lengths,
            scale=0.1,
            tiling=SMALL_DECODE,
        )
        check(actual, rows, scale=0.1)


PREFILL_SHAPES = [
    (2, 2, 64, torch.float32, {}),
    (6, 2, 80, torch.float32, {"window": 7}),
    (5, 1, 96, torch.float32, {"soft_cap": 2.0}),
    (8, 1, 128, torch.float16, {}),
    (12, 3, 64, torch.float32, {}),
    (6, 1, 64, torch.float32, {"window": 1}),
    (4, 2, 128, torch.bfloat16, {"window": 20}),
    (7, 1, 256, torch.float32, {"soft_cap": 1.0, "window": 5}),
]


@pytest.mark.parametrize(("heads", "kv_heads", "dim", "dtype", "options"), PREFILL_SHAPES)
def test_prefill_attention_agrees_over_chunks_of_any_length(
    interpreted: Any,
    heads: int,
    kv_heads: int,
    dim: int,
    dtype: torch.dtype,
    options: dict[str, Any],
) -> None:
    options = {"scale": dim**-0.5, **options}
    # A whole prompt, nothing, one decoding token, a chunk behind a context.
    counts, lengths = [9, 0, 1, 5], [9, 0, 22, 38]
    rows = make_rows(
        counts,
        lengths,
        heads=heads,
        kv_heads=kv_heads,
        dim=dim,
        dtype=dtype,
        window=options.get("window", 0),
    )
    actual = interpreted(prefill_attention, *rows.args(), tiling=SMALL_PREFILL, **options)
    check(actual, rows, **options)


def test_chunks_that_start_just_before_at_and_behind_the_edge_of_a_tile_agree(
    interpreted: Any,
) -> None:
    starts = [SMALL_PREFILL.tile + shift for shift in (-2, -1, 0, 1)]
    rows = make_rows([3] * 4, [start + 3 for start in starts], heads=2, kv_heads=2, dim=64)
    actual = interpreted(prefill_attention, *rows.args(), scale=0.125, tiling=SMALL_PREFILL)
    check(actual, rows, scale=0.125)


@pytest.mark.parametrize("kernel", ["decode", "prefill"])
def test_attention_over_an_fp8_cache_agrees_with_its_dequantised_values(
    interpreted: Any, kernel: str
) -> None:
    counts, lengths = ([1, 1], [5, 21]) if kernel == "decode" else ([5, 3], [5, 21])
    rows = make_rows(counts, lengths, heads=4, kv_heads=2, dim=64, block_size=8)
    kv = fp8_layer(rows.kv.shape[0], 2, 8, 64)
    k, v = rows.kv.nan_to_num(0).permute(1, 0, 3, 2, 4).flatten(1, 2)
    shared.append(kv, k, v * torch.logspace(-2, 2, len(v))[:, None, None], torch.arange(len(k)))
    expected = reference.attend_rows(
        rows.q, kv, rows.tables, rows.token_starts, rows.lengths, scale=0.125
    )
    if kernel == "decode":
        actual = interpreted(
            decode_attention,
            rows.q,
            kv,
            rows.tables,
            rows.lengths,
            scale=0.125,
            num_splits=2,
            tiling=SMALL_DECODE,
        )
    else:
        actual = interpreted(
            prefill_attention,
            rows.q,
            kv,
            rows.tables,
            rows.token_starts,
            rows.lengths,
            scale=0.125,
            tiling=SMALL_PREFILL,
        )
    torch.testing.assert_close(actual, expected, atol=2e-5, rtol=2e-5)


def test_small_batches_are_split_until_the_device_is_full_and_large_ones_are_not() -> None:
    assert splits_for(1, 8, 8192, 132) == 32  # 33 wanted, but each at least 256 positions
    assert splits_for(1, 8, 100, 132) == 1
    assert splits_for(64, 8, 8192, 132) == 1
    assert splits_for(1, 1, 10**6, 132) == 64
