"""Kernels that work row by row: append, copies of blocks, norms, sampling, experts."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from phasewise.engine.logits import KeyFormat
from phasewise.kernels import reference as shared
from phasewise.kernels.cuda import activations, append, experts, norms, reference, sampling
from phasewise.kernels.cuda.transfer import gather_blocks, scatter_blocks
from torch import Tensor

from .case import BLOCK_SIZE, Case, Device, Sizes, itself


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
        ("gather", gather, itself),
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
