"""A model's steps by torch's own operators: any device, any dtype, rows one by one."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from . import experts, reference
from .rows import Rows


@dataclass(frozen=True, kw_only=True, slots=True)
class TorchPlan:
    """One step's rows on the device."""

    slots: Tensor  # int64 [tokens]
    angles: Tensor  # int64 [tokens]: row of the cos/sin table
    tables: Tensor  # int64 [rows, width]
    starts: list[int]
    counts: list[int]


class TorchOperators:
    """What `CpuOperators` does, from `reference`."""

    def plan(self, rows: Rows, angles: Tensor, device: torch.device) -> TorchPlan:
        return TorchPlan(
            slots=torch.from_numpy(rows.slots).to(device),
            angles=angles,
            tables=torch.from_numpy(rows.tables).to(device).long(),
            starts=rows.starts.tolist(),
            counts=rows.counts.tolist(),
        )

    def rms_norm(
        self, x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None
    ) -> Tensor:
        """RMSNorm of x, or of the residual after x was added to it in place."""
        return reference.rms_norm(x if residual is None else residual.add_(x), weight, eps)

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        return reference.silu_mul(gate_up)

    def experts(self, x: Tensor, gate_up: Tensor, down: Tensor, routing: experts.Routing) -> Tensor:
        """Each token through its experts [experts, out, in], weighed and summed."""
        return experts.by_loop(x, gate_up, down, routing, self.silu_mul)

    def rope_append(
        self,
        qkv: Tensor,  # [tokens, (heads + 2 kv_heads) * dim]
        kv: Tensor,  # [blocks, 2, kv_heads, block_size, dim]
        plan: TorchPlan,
        cos_sin: Tensor | None,  # float32 [angles, dim]; None: positions were added before
        norms: tuple[Tensor, Tensor] | None,  # weights of q and k norm
        eps: float,
    ) -> None:
        """Normalise and rotate q in `qkv`; write rotated k and v into their blocks."""
        kv_heads, dim = kv.shape[2], kv.shape[4]
        heads = qkv.view(len(qkv), -1, dim)
        num_heads = heads.shape[1] - 2 * kv_heads
        q, k, v = heads.split((num_heads, kv_heads, kv_heads), dim=1)
        if norms is not None:
            q = reference.rms_norm(q, norms[0], eps)
            k = reference.rms_norm(k, norms[1], eps)
        if cos_sin is not None:
            angles = cos_sin[plan.angles]
            q, k = reference.rotate(q, angles), reference.rotate(k, angles)
        heads[:, :num_heads] = q
        reference.append(kv, k, v, plan.slots)

    def attention(
        self, qkv: Tensor, kv: Tensor, plan: TorchPlan, *, window: int, scale: float
    ) -> Tensor:  # [tokens, heads * dim]
        """Causal attention of every row over its blocks; `window` 0: the whole context."""
        kv_heads, dim = kv.shape[2], kv.shape[4]
        num_heads = qkv.shape[1] // dim - 2 * kv_heads
        q = qkv.view(len(qkv), -1, dim)[:, :num_heads]
        out = torch.empty_like(q)
        at = 0
        for row, (start, count) in enumerate(zip(plan.starts, plan.counts, strict=True)):
            span = slice(at, at + count)
            out[span] = reference.attend(
                q[span], kv, plan.tables[row], start, window=window, scale=scale
            )
            at += count
        return out.reshape(len(qkv), num_heads * dim)
