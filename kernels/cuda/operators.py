"""A model's steps on CUDA by Triton: one launch each, KV blocks read where they lie.

A step's rows come as one upload, in columns that each begin at a multiple of 16 bytes; widths that
change from step to step are rounded up, so that a kernel is compiled once. Rows that compute one
token take the decode kernel, split along their context; all others the prefill kernel.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..experts import Routing
from ..rows import Rows
from . import activations, append, experts, norms
from .decode_attention import decode_attention, splits_for
from .prefill_attention import prefill_attention

_WIDTH = 16  # block tables are multiples of so many entries wide
_ALIGNMENT = 16  # bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class Singles:
    """Rows of one token each: the step's first tokens."""

    tables: Tensor  # int32 [rows, width]
    lengths: Tensor  # int32 [rows], with the token itself; 0: padding
    longest: int  # at least the longest context


@dataclass(frozen=True, kw_only=True, slots=True)
class Chunks:
    """Rows of any number of tokens: the step's tokens from `first` on."""

    first: int
    tables: Tensor  # int32 [rows, width]
    lengths: Tensor  # int32 [rows], with the chunk
    token_starts: Tensor  # int32 [rows + 1], from `first` on


@dataclass(frozen=True, kw_only=True, slots=True)
class CudaPlan:
    """One step's rows on the device."""

    slots: Tensor  # int64 [tokens]; below zero: nothing is written
    angles: Tensor  # int64 [tokens]: row of the cos/sin table
    singles: Singles | None
    chunks: Chunks | None


class CudaOperators:
    """What `CpuOperators` does, by the kernels beside this file, in any of their dtypes.

    Nothing waits for the device, and nothing that a plan of `Singles` leads to depends on what the
    host knows of the rows but their number and `longest`: a CUDA graph may hold it.
    """

    def __init__(self, multiprocessors: int) -> None:
        self.multiprocessors = multiprocessors

    def plan(self, rows: Rows, angles: Tensor, device: torch.device) -> CudaPlan:
        """The step's columns on the device; once a step, used by every layer."""
        contexts = rows.starts + rows.counts
        several = np.flatnonzero(rows.counts > 1)
        num_singles = int(several[0]) if len(several) else len(contexts)
        tables = _padded(rows.tables)
        columns = [rows.slots]
        if num_singles:
            columns += [tables[:num_singles], contexts[:num_singles].astype(np.int32)]
        if len(several):
            starts = np.append(rows.firsts[num_singles:], rows.num_tokens) - num_singles
            columns += [tables[num_singles:], contexts[num_singles:].astype(np.int32)]
            columns.append(starts.astype(np.int32))
        slots, *rest = _upload(columns, device)
        singles = chunks = None
        if num_singles:
            longest = int(contexts[:num_singles].max())
            singles = Singles(tables=rest[0], lengths=rest[1], longest=longest)
        if len(several):
            chunks = Chunks(
                first=num_singles, tables=rest[-3], lengths=rest[-2], token_starts=rest[-1]
            )
        return CudaPlan(slots=slots, angles=angles, singles=singles, chunks=chunks)

    def rms_norm(
        self, x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None
    ) -> Tensor:
        """RMSNorm of x, or of the residual after x was added to it in place."""
        return norms.rms_norm(x, weight, eps, residual)

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        """silu(gate) * up for rows of [gate, up]."""
        return activations.silu_mul(gate_up)

    def experts(self, x: Tensor, gate_up: Tensor, down: Tensor, routing: Routing) -> Tensor:
        """Each token through its experts [experts, out, in], weighed and summed."""
        return experts.mixture(x, gate_up, down, routing)

    def rope_append(
        self,
        qkv: Tensor,  # [tokens, (heads + 2 kv_heads) * dim]
        kv: Tensor,  # [blocks, 2, kv_heads, block_size, dim]
        plan: CudaPlan,
        cos_sin: Tensor | None,  # float32 [angles, dim]; None: positions were added before
        norms: tuple[Tensor, Tensor] | None,  # weights of q and k norm
        eps: float,
    ) -> None:
        """Normalise and rotate q in `qkv`; write rotated k and v into their blocks."""
        kv_heads, dim = kv.shape[2], kv.shape[4]
        q_weight, k_weight = (None, None) if norms is None else norms
        append.rope_append(
            qkv,
            kv,
            plan.slots,
            plan.angles,
            cos_sin,
            heads=qkv.shape[1] // dim - 2 * kv_heads,
            kv_heads=kv_heads,
            q_weight=q_weight,
            k_weight=k_weight,
            eps=eps,
        )

    def attention(
        self, qkv: Tensor, kv: Tensor, plan: CudaPlan, *, window: int, scale: float
    ) -> Tensor:  # [tokens, heads * dim]
        """Causal attention of every row over its blocks; `window` 0: the whole context."""
        kv_heads, dim = kv.shape[2], kv.shape[4]
        q = qkv.view(len(qkv), -1, dim)[:, : -2 * kv_heads]
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        singles, chunks = plan.singles, plan.chunks
        if singles is not None:
            rows = len(singles.lengths)
            seen = min(singles.longest, window or singles.longest)
            decode_attention(
                q[:rows],
                kv,
                singles.tables,
                singles.lengths,
                scale=scale,
                window=window,
                num_splits=splits_for(rows, kv_heads, seen, self.multiprocessors),
                out=out[:rows],
            )
        if chunks is not None:
            prefill_attention(
                q[chunks.first :],
                kv,
                chunks.tables,
                chunks.token_starts,
                chunks.lengths,
                scale=scale,
                window=window,
                out=out[chunks.first :],
            )
        return out.view(len(qkv), -1)


def _padded(tables: np.ndarray) -> np.ndarray:
    """Tables with their width rounded up; what was added is never read."""
    missing = -tables.shape[1] % _WIDTH
    return np.pad(tables, ((0, 0), (0, missing))) if missing else tables


def _upload(columns: list[np.ndarray], device: torch.device) -> list[Tensor]:
    """The columns on `device` by one copy, without waiting for what the device is doing."""
    starts, size = [], 0
    for column in columns:
        starts.append(size)
        size += -(-column.nbytes // _ALIGNMENT) * _ALIGNMENT
    staged = torch.empty(size, dtype=torch.uint8, pin_memory=device.type == "cuda")
    flat = staged.numpy()
    for start, column in zip(starts, columns, strict=True):
        flat[start : start + column.nbytes] = np.ascontiguousarray(column).reshape(-1).view("u1")
    there = staged.to(device, non_blocking=True)
    return [
        there[start : start + column.nbytes].view(_DTYPES[column.dtype.name]).view(column.shape)
        for start, column in zip(starts, columns, strict=True)
    ]


_DTYPES = {"int32": torch.int32, "int64": torch.int64}
