"""A model's steps on CPU by Numba: single pass per step, KV blocks read where they lie.

Chunks of `GATHER_FROM` tokens or more gather their context once and take torch's SDPA, whose
tiled products win there (measured: see `benchmarks`); all other tokens never copy the context.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from . import experts, reference
from .chunk_attention import COLUMNS, chunk_body, chunk_scratch_floats, takes
from .fp8 import E4M3
from .fp8_decode import fp8_decode_body
from .fp8_rows import append_rows, gather_rows
from .openmp import HAS_OPENMP, float_bits
from .paged_decode import decode_body, scratch_floats
from .rows import Rows
from .rowwise import rms_norm_body, rope_append_body, silu_mul_body
from .softmax import ROW_PADDING

GATHER_FROM = 32  # tokens a row
CACHED_SCORES = 1 << 16  # float32 scores of one task: a quarter of a small L2


@dataclass(frozen=True, kw_only=True, slots=True)
class CpuPlan:
    """One step's tokens, split into those attended in place and long chunks."""

    rows: Rows
    angles: Tensor  # int64 [tokens]: row of the cos/sin table
    tokens: np.ndarray  # int64: tokens attended in place
    token_rows: np.ndarray  # int64: their rows
    contexts: np.ndarray  # int64: positions each sees
    chunks: list[tuple[int, int, int, int]]  # (first token, count, start, row)


class CpuOperators:
    """Numba bodies for one dtype and block shape, on `threads` of torch's OpenMP threads."""

    def __init__(self, dtype: torch.dtype, head_dim: int, block_size: int, threads: int) -> None:
        assert threads == 1 or HAS_OPENMP, "the caller asks for threads that exist"
        wide = dtype == torch.float32
        self.threads = threads
        self._dim = head_dim
        self._block_size = block_size
        self._norm = rms_norm_body(wide)
        self._silu_mul = silu_mul_body(wide)
        self._rope_append = rope_append_body(head_dim, wide)
        self._decode = decode_body(head_dim, block_size, wide)
        self._chunks = chunk_body(head_dim, block_size, wide) if takes(head_dim) else None
        self._scratch = np.empty(0, np.float32)

    def _scratch_at(self, floats: int) -> int:
        """Address of scratch for so many floats a thread; grows, and is kept."""
        if len(self._scratch) < floats * self.threads:
            self._scratch = np.empty(2 * floats * self.threads, np.float32)
        return self._scratch.ctypes.data

    def plan(self, rows: Rows, angles: Tensor, device: torch.device) -> CpuPlan:
        """Split the step's tokens; once a step, used by every layer."""
        long_rows = np.flatnonzero(rows.counts >= GATHER_FROM)
        tokens, token_rows = np.arange(rows.num_tokens), rows.row_of
        if len(long_rows):
            tokens = np.flatnonzero((rows.counts < GATHER_FROM)[rows.row_of])
            token_rows = rows.row_of[tokens]
        chunks = [
            (
                int(rows.firsts[row]),
                int(rows.counts[row]),
                int(rows.starts[row]),
                int(row),
            )
            for row in long_rows
        ]
        return CpuPlan(
            rows=rows,
            angles=angles,
            tokens=tokens,
            token_rows=token_rows,
            contexts=rows.positions[tokens] + 1,
            chunks=chunks,
        )

    def rms_norm(
        self, x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None
    ) -> Tensor:
        """RMSNorm of x, or of the residual after x was added to it in place."""
        num_rows, dim = x.shape
        out = torch.empty_like(x)
        self._norm.run(
            self.threads,
            num_rows,
            dim,
            float_bits(eps),
            x.data_ptr(),
            0 if residual is None else residual.data_ptr(),
            weight.data_ptr(),
            out.data_ptr(),
            self._scratch_at(2 * dim),
        )
        return out

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        """silu(gate) * up for rows of [gate, up]."""
        num_rows, dim = gate_up.shape[0], gate_up.shape[1] // 2
        out = torch.empty((num_rows, dim), dtype=gate_up.dtype)
        self._silu_mul.run(
            self.threads,
            num_rows,
            dim,
            gate_up.data_ptr(),
            out.data_ptr(),
        )
        return out

    def experts(self, x: Tensor, gate_up: Tensor, down: Tensor, routing: experts.Routing) -> Tensor:
        """Each token through its experts [experts, out, in], weighed and summed."""
        return experts.by_loop(x, gate_up, down, routing, self.silu_mul)

    def rope_append(
        self,
        qkv: Tensor,  # [tokens, (heads + 2 kv_heads) * dim]
        kv: Tensor,  # [blocks, 2, kv_heads, block_size, dim]
        plan: CpuPlan,
        cos_sin: Tensor | None,  # float32 [angles, dim]; None: positions were added before
        norms: tuple[Tensor, Tensor] | None,  # weights of q and k norm
        eps: float,
    ) -> None:
        """Normalise and rotate q in `qkv`; write rotated k and v into their blocks."""
        kv_heads = kv.shape[2]
        self._rope_append.run(
            self.threads,
            len(qkv),
            qkv.shape[1] // self._dim - 2 * kv_heads,
            kv_heads,
            self._block_size,
            float_bits(eps),
            0 if norms is None else norms[0].data_ptr(),
            0 if norms is None else norms[1].data_ptr(),
            qkv.data_ptr(),
            0 if kv.dtype == E4M3 else kv.data_ptr(),
            plan.rows.slots.ctypes.data,
            plan.angles.data_ptr(),
            0 if cos_sin is None else cos_sin.data_ptr(),
            self._scratch_at(2 * self._dim),
        )
        if kv.dtype == E4M3:
            append_rows(qkv, kv, plan.rows.slots, self.threads)

    def attention(
        self, qkv: Tensor, kv: Tensor, plan: CpuPlan, *, window: int, scale: float
    ) -> Tensor:  # [tokens, heads * dim]
        """Causal attention of every row over its blocks; `window` 0: the whole context."""
        num_heads = qkv.shape[1] // self._dim - 2 * kv.shape[2]
        out = torch.empty((len(qkv), num_heads * self._dim), dtype=qkv.dtype)
        if len(plan.tokens):
            self._attend_in_place(qkv, kv, plan, out, window, scale)
        if plan.chunks and self._chunks is not None and kv.dtype != E4M3:
            self._attend_chunks(qkv, kv, plan, out, window, scale)
            return out
        for first, count, start, row in plan.chunks:
            table = torch.from_numpy(plan.rows.tables[row].astype(np.int64))
            q = qkv[first : first + count].view(count, -1, self._dim)[:, :num_heads]
            attended = self._attend_chunk(q, kv, table, start, window, scale)
            out[first : first + count] = attended.view(count, -1)
        return out

    def _attend_chunks(
        self, qkv: Tensor, kv: Tensor, plan: CpuPlan, out: Tensor, window: int, scale: float
    ) -> None:
        assert self._chunks is not None
        visible_blocks = reference.visible_blocks
        size, kv_heads, stride = self._block_size, kv.shape[2], plan.rows.tables.strides[0]
        table_at = plan.rows.tables.ctypes.data
        chunks = [
            (first, count, start, size * visible_blocks(start, count, window, size).start, row)
            for first, count, start, row in plan.chunks
        ]
        columns = np.array(chunks, dtype=np.int64)
        columns[:, 4] = table_at + stride * columns[:, 4]
        longest = int((columns[:, 1] + columns[:, 2] - columns[:, 3]).max())
        longest = -(-longest // COLUMNS) * COLUMNS
        tasks = len(chunks) * kv_heads
        self._chunks.run(
            self.threads,
            len(chunks),
            out.shape[1] // self._dim,
            kv_heads,
            -(-2 * self.threads // tasks) if self.threads > 1 else 1,
            window,
            qkv.stride(0),
            out.stride(0),
            float_bits(scale),
            qkv.data_ptr(),
            kv.data_ptr(),
            out.data_ptr(),
            columns.ctypes.data,
            self._scratch_at(chunk_scratch_floats(longest, self._dim)),
            longest,
        )

    def _attend_chunk(
        self, q: Tensor, kv: Tensor, table: Tensor, start: int, window: int, scale: float
    ) -> Tensor:  # [count, heads, dim]
        if kv.dtype != E4M3:
            return reference.attend(q, kv, table, start, window=window, scale=scale)
        seen = reference.visible_blocks(start, len(q), window, self._block_size)
        k, v = gather_rows(kv, table[seen.start : seen.stop], q.dtype, self.threads)
        begin = seen.start * self._block_size
        return reference.attend_dense(q, k, v, start, begin, window=window, scale=scale)

    def _attend_in_place(
        self, qkv: Tensor, kv: Tensor, plan: CpuPlan, out: Tensor, window: int, scale: float
    ) -> None:
        kv_heads = kv.shape[2]
        num_heads = out.shape[1] // self._dim
        longest = plan.rows.tables.shape[1] * self._block_size + ROW_PADDING
        group = num_heads // kv_heads
        span = self._span(len(plan.tokens), kv_heads, group * longest)
        bounds = self._bounds(plan.contexts, kv_heads // span, window)
        decode, floats = self._decode, scratch_floats(span * group, self._dim, longest)
        if kv.dtype == E4M3:
            wide = qkv.dtype == torch.float32
            decode = fp8_decode_body(self._dim, self._block_size, kv.stride(2), wide)
            floats += self._block_size * self._dim  # a tile widened
        decode.run(
            self.threads,
            num_heads,
            kv_heads,
            len(plan.tokens),
            window,
            longest,
            qkv.stride(0),
            out.stride(0),
            plan.rows.tables.shape[1],
            float_bits(scale),
            qkv.data_ptr(),
            kv.data_ptr(),
            out.data_ptr(),
            plan.tokens.ctypes.data,
            plan.token_rows.ctypes.data,
            plan.contexts.ctypes.data,
            bounds.ctypes.data,
            self._scratch_at(floats),
            plan.rows.tables.ctypes.data,
            span,
        )

    def _span(self, num_tokens: int, kv_heads: int, floats_a_head: int) -> int:
        """KV heads a task: all where tokens alone feed the threads and the scores fit the cache."""
        if self.threads > 1 and num_tokens < 8 * self.threads:
            return 1
        span = kv_heads
        while span > 1 and (kv_heads % span or span * floats_a_head > CACHED_SCORES):
            span -= 1
        return span

    def _bounds(self, contexts: np.ndarray, spans: int, window: int) -> np.ndarray:
        """Task numbers at which each thread begins, so that all read about equally much."""
        total = len(contexts) * spans
        if self.threads == 1:
            return np.array([0, total])
        reads = np.minimum(contexts, window) if window else contexts
        done = np.cumsum(np.repeat(reads, spans))
        shares = done[-1] * np.arange(1, self.threads) / self.threads
        return np.concatenate(([0], np.searchsorted(done, shares), [total]))
