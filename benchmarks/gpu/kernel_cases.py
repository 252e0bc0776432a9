"""What `kernels.py` measures: each kernel on the shapes of Llama-3.1-8B (Mixtral's for experts).

A case can be built at any size: large to be timed, small to be checked against float64, tiny to be
run by Triton's interpreter without a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from phasewise.engine.logits import KeyFormat
from phasewise.kernels import reference as shared
from phasewise.kernels.cuda import activations, append, experts, norms, reference, sampling
from phasewise.kernels.cuda.decode_attention import (
    DecodeTiling,
    decode_attention,
    splits_for,
)
from phasewise.kernels.cuda.prefill_attention import PrefillTiling, prefill_attention
from phasewise.kernels.cuda.transfer import gather_blocks, scatter_blocks
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


def _itself(result: Tensor) -> Tensor:
    return result


@dataclass(frozen=True, kw_only=True)
class Case:
    """One kernel on one shape. `compared(run())` should be `truth()`."""

    name: str
    run: Callable[[], Tensor]
    truth: Callable[[], Tensor]
    compared: Callable[[Tensor], Tensor] = _itself  # kept out of the time
    tolerance: float  # of the largest difference, over the largest true value
    num_bytes: int = 0  # that must be read and written
    flops: int = 0
    peers: dict[str, Callable[[], Any]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class Device:
    device: torch.device
    dtype: torch.dtype
    multiprocessors: int

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, device=self.device, dtype=torch.float32).to(self.dtype)


@dataclass(frozen=True, kw_only=True)
class Paged:
    """Rows of equal length over shuffled blocks, and the same keys and values laid out densely."""

    kv: Tensor
    tables: Tensor
    lengths: Tensor
    scales: Tensor | None = None

    def dense(self) -> tuple[Tensor, Tensor]:
        """k, v [rows, kv_heads, length, dim]."""
        length = int(self.lengths[0])
        gathered = self.kv[self.tables.long()].permute(2, 0, 3, 1, 4, 5).flatten(3, 4)
        return gathered[0][:, :, :length].contiguous(), gathered[1][:, :, :length].contiguous()


def paged(on: Device, rows: int, length: int, sizes: Sizes, *, fp8: bool = False) -> Paged:
    width = -(-length // BLOCK_SIZE)
    shape = (rows * width, 2, sizes.kv_heads, BLOCK_SIZE, sizes.dim)
    kv, scales = on.normal(*shape), None
    if fp8:
        scales = torch.full(shape[:3], 2.0**-6, device=on.device)
        kv = (kv.float() / 2.0**-6).clamp(-448, 448).to(torch.float8_e4m3fn)
    tables = torch.randperm(rows * width, device=on.device).int().view(rows, width)
    lengths = torch.full((rows,), length, dtype=torch.int32, device=on.device)
    return Paged(kv=kv, tables=tables, lengths=lengths, scales=scales)


def _starts(on: Device, rows: int, count: int) -> Tensor:
    return (torch.arange(rows + 1, device=on.device) * count).int()


def decode_case(
    on: Device, sizes: Sizes, *, fp8: bool = False, tiling: DecodeTiling | None = None
) -> Case:
    rows, length, scale = sizes.rows, sizes.length, sizes.dim**-0.5
    data = paged(on, rows, length, sizes, fp8=fp8)
    q = on.normal(rows, sizes.heads, sizes.dim)
    splits = splits_for(rows, sizes.kv_heads, length, on.multiprocessors)
    options: dict[str, Any] = {"scale": scale, "scales": data.scales}
    peers: dict[str, Callable[[], Any]] = {}
    if not fp8:
        k, v = data.dense()
        peers["sdpa"] = lambda: F.scaled_dot_product_attention(
            q[:, :, None], k, v, scale=scale, enable_gqa=True
        )
    item = 1 if fp8 else 2
    return Case(
        name=f"decode attention{', fp8' * fp8}, {rows} x {length}, {splits} splits",
        run=lambda: decode_attention(
            q, data.kv, data.tables, data.lengths, num_splits=splits, tiling=tiling, **options
        ),
        truth=lambda: reference.attend_rows(
            q.double(),
            data.kv if fp8 else data.kv.double(),
            data.tables,
            _starts(on, rows, 1),
            data.lengths,
            **options,
        ),
        tolerance=1e-2,
        num_bytes=item * 2 * rows * length * sizes.kv_heads * sizes.dim,
        flops=4 * rows * length * sizes.heads * sizes.dim,
        peers=peers,
    )


def prefill_case(
    on: Device, sizes: Sizes, *, fp8: bool = False, tiling: PrefillTiling | None = None
) -> Case:
    """One row whose last `chunk` positions are computed, of `length`."""
    length, chunk, scale = sizes.length, min(sizes.chunk, sizes.length), sizes.dim**-0.5
    data, starts = paged(on, 1, length, sizes, fp8=fp8), _starts(on, 1, chunk)
    q = on.normal(chunk, sizes.heads, sizes.dim)
    options: dict[str, Any] = {"scale": scale, "scales": data.scales}
    peers: dict[str, Callable[[], Any]] = {}
    if chunk == length and not fp8:
        k, v = data.dense()
        query = q.transpose(0, 1)[None]
        peers["sdpa"] = lambda: F.scaled_dot_product_attention(
            query, k, v, scale=scale, is_causal=True, enable_gqa=True
        )
        if on.device.type == "cuda":
            peers["flex"] = _flex(query, k, v, scale)
    pairs = chunk * (length - chunk) + chunk * (chunk + 1) // 2
    rows = (data.tables, starts, data.lengths)
    return Case(
        name=f"prefill attention{', fp8' * fp8}, {chunk} of {length}",
        run=lambda: prefill_attention(q, data.kv, *rows, tiling=tiling, **options),
        truth=lambda: reference.attend_rows(
            q.double(), data.kv if fp8 else data.kv.double(), *rows, **options
        ),
        tolerance=1e-2,
        flops=4 * pairs * sizes.heads * sizes.dim,
        peers=peers,
    )


def _flex(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Callable[[], Any]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def causal(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return query >= key

    mask = create_block_mask(causal, None, None, q.shape[2], k.shape[2], device=str(q.device))
    compiled: Any = torch.compile(flex_attention)
    return lambda: compiled(q, k, v, block_mask=mask, scale=scale, enable_gqa=True)


def append_cases(on: Device, sizes: Sizes) -> Iterator[Case]:
    tokens, heads, kv_heads, dim = sizes.tokens, sizes.heads, sizes.kv_heads, sizes.dim
    blocks = -(-tokens // BLOCK_SIZE)
    kv = torch.zeros((blocks, 2, kv_heads, BLOCK_SIZE, dim), dtype=on.dtype, device=on.device)
    source = on.normal(tokens, heads + 2 * kv_heads, dim)
    k, v = source[:, heads:].split(kv_heads, dim=1)
    slots = torch.randperm(blocks * BLOCK_SIZE, device=on.device)[:tokens]
    weights = 1 + on.normal(2, dim) / 10
    positions = torch.arange(tokens, device=on.device)
    turns = positions[:, None] * 10.0 ** -torch.linspace(0, 4, dim // 2, device=on.device)
    angles = torch.cat((turns.cos(), turns.sin()), dim=1)
    qkv = source.flatten(1)

    def appended() -> Tensor:
        append.append(kv, k, v, slots)
        return kv

    def append_truth() -> Tensor:
        expected = torch.zeros_like(kv)
        shared.append(expected, k, v, slots)
        return expected.double()

    def fused() -> Tensor:
        append.rope_append(
            qkv, kv, slots, positions, angles, heads=heads, kv_heads=kv_heads,
            q_weight=weights[0], k_weight=weights[1], eps=1e-6,
        )  # fmt: skip
        return kv

    key = k.clone()  # the fused kernel leaves keys as they are, but that is not promised

    def fused_truth() -> Tensor:
        expected = torch.zeros_like(kv)
        turned = shared.rotate(shared.rms_norm(key, weights[1], 1e-6), angles)
        shared.append(expected, turned, v, slots)
        return expected.double()

    moved = tokens * kv_heads * dim * 4
    rotated = tokens * (heads + kv_heads) * dim * 4 + tokens * kv_heads * dim * 4
    yield Case(
        name=f"append, {tokens} tokens",
        run=appended,
        truth=append_truth,
        tolerance=0.0,
        num_bytes=2 * moved,
    )
    yield Case(
        name=f"norm, rotary, append, {tokens} tokens",
        run=fused,
        truth=fused_truth,
        tolerance=2e-2,
        num_bytes=rotated + 4 * tokens * dim,
    )


def transfer_cases(on: Device, sizes: Sizes) -> Iterator[Case]:
    blocks = -(-sizes.length // BLOCK_SIZE)
    pool = on.normal(sizes.layers, 2 * blocks, 2, sizes.kv_heads, BLOCK_SIZE, sizes.dim)
    ids = torch.randperm(2 * blocks, device=on.device)[:blocks]
    filled = pool[:, ids]
    buffer, target = torch.zeros_like(filled), torch.zeros_like(pool)

    def gather() -> Tensor:
        gather_blocks(pool, ids, buffer)
        return buffer

    def scatter() -> Tensor:
        scatter_blocks(filled, target, ids)
        return target

    for name, run, compared in (
        ("gather", gather, _itself),
        ("scatter", scatter, lambda result: result[:, ids]),
    ):
        yield Case(
            name=f"{name} of {blocks} blocks, {sizes.layers} layers",
            run=run,
            truth=lambda: filled.double(),
            compared=compared,
            tolerance=0.0,
            num_bytes=2 * buffer.nbytes,
            peers={"index_select": lambda: pool.index_select(1, ids)},
        )


def row_cases(on: Device, sizes: Sizes) -> Iterator[Case]:
    tokens, hidden = sizes.tokens, sizes.hidden
    x, residual, weight = on.normal(tokens, hidden), on.normal(tokens, hidden), on.normal(hidden)
    added = (x + residual).double()
    gate_up = on.normal(tokens, 2 * sizes.ffn)
    yield Case(
        name=f"rms norm + residual, {tokens} x {hidden}",
        run=lambda: norms.rms_norm(x, weight, 1e-5, residual),
        truth=lambda: shared.rms_norm(added, weight.double(), 1e-5),
        tolerance=2e-2,
        num_bytes=4 * x.nbytes,
        peers={"torch": lambda: F.rms_norm(x + residual, (hidden,), weight, 1e-5)},
    )
    yield Case(
        name=f"silu times up, {tokens} x {sizes.ffn}",
        run=lambda: activations.silu_mul(gate_up),
        truth=lambda: shared.silu_mul(gate_up.double()),
        tolerance=1e-2,
        num_bytes=gate_up.nbytes * 3 // 2,
        peers={"torch": lambda: shared.silu_mul(gate_up)},
    )


def sampling_cases(on: Device, sizes: Sizes) -> Iterator[Case]:
    rows, vocab = sizes.rows, sizes.vocab
    logits = torch.randn(rows, vocab, device=on.device) * 2
    maxima, form = logits.amax(dim=1), KeyFormat(vocab)
    one = torch.ones(rows, device=on.device)
    keys = form.keys(logits.clone(), maxima, one)
    seeds, floors = torch.arange(rows, device=on.device), torch.zeros_like(keys[:, 0])
    share = one.double() * 0.9
    off = floors.clone()

    def host() -> Tensor:
        from phasewise.engine.draws import uniforms

        drawn = torch.from_numpy(uniforms(list(range(rows)), [0] * rows)).to(on.device)
        return form.draw(keys, form.top_p_floor(keys, floors, share), drawn)

    yield Case(
        name=f"argmax, {rows} x {vocab}",
        run=lambda: sampling.argmax(logits)[0],
        truth=lambda: logits.argmax(dim=1),
        tolerance=0.0,
        num_bytes=logits.nbytes,
        peers={"torch": lambda: logits.argmax(dim=1)},
    )
    yield Case(
        name=f"keys, {rows} x {vocab}",
        run=lambda: sampling.keys(logits, maxima, one),
        truth=lambda: form.weights(keys).double(),
        compared=form.weights,
        tolerance=1e-6,
        num_bytes=3 * logits.nbytes,
        peers={"torch": lambda: form.keys(logits.clone(), maxima, one)},
    )
    yield Case(
        name=f"draw with top_p, {rows} x {vocab}",
        run=lambda: sampling.draw(keys, floors, off, share, seeds, off),
        truth=host,
        tolerance=0.0,
        num_bytes=keys.nbytes,
        peers={"torch, sorting": lambda: form.top_p_floor(keys, floors, share)},
    )


def expert_case(on: Device, sizes: Sizes, tokens: int) -> Case:
    x, weights = on.normal(tokens, sizes.hidden), on.normal(sizes.experts, sizes.ffn, sizes.hidden)
    slots = 2 * tokens
    starts = (torch.arange(sizes.experts + 1, device=on.device) * slots // sizes.experts).int()
    rows = (torch.randperm(slots, device=on.device) % tokens).int()
    gathered, peers = x[rows.long()], {}
    if on.device.type == "cuda" and hasattr(torch, "_grouped_mm"):
        transposed = weights.transpose(1, 2)
        peers["torch._grouped_mm"] = lambda: torch._grouped_mm(
            gathered, transposed, offs=starts[1:]
        )
    return Case(
        name=f"expert product, {tokens} tokens x 2 of {sizes.experts}",
        run=lambda: experts.grouped_matmul(x, weights, rows, starts),
        truth=lambda: reference.grouped_matmul(x.double(), weights.double(), rows, starts),
        tolerance=1e-2,
        num_bytes=weights.nbytes + 2 * slots * (sizes.hidden + sizes.ffn),
        flops=2 * slots * sizes.hidden * sizes.ffn,
        peers=peers,
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
