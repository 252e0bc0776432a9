"""Rotary frequencies and cos/sin tables, equal to transformers' to the last bit of float32.

`dynamic` (NTK-aware) frequencies depend on the length at the time of computing: `generate` rotates
a whole prompt by the prompt's length and every later token by its own. So a position's angle is a
function of (position, prompt length) alone, which chunked prefill, preemption and failover keep.
KV of such a model may be shared between requests only where the lengths stay within
`max_position_embeddings` or are equal.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from .rope_spec import RopeSpec
from .upload import upload


def _base_frequencies(theta: float | Tensor, dim: int) -> Tensor:
    return 1.0 / (theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim))


def _llama3(rope: RopeSpec, dim: int) -> Tensor:
    """Long wavelengths divided by the factor, a smooth passage between (Llama 3.1)."""
    plain = _base_frequencies(rope.theta, dim)
    length = rope.original_max_positions
    wavelength = 2 * math.pi / plain
    is_low = wavelength > length / rope.low_freq_factor
    is_high = wavelength < length / rope.high_freq_factor
    scaled = torch.where(is_low, plain / rope.factor, plain)
    span = rope.high_freq_factor - rope.low_freq_factor
    smooth = (length / wavelength - rope.low_freq_factor) / span
    between = (1 - smooth) * scaled / rope.factor + smooth * scaled
    return torch.where(~is_low & ~is_high, between, scaled)


def _yarn(rope: RopeSpec, dim: int) -> Tensor:
    """NTK by parts (YaRN, arXiv 2309.00071, section 3.2)."""

    def turning_dim(rotations: float) -> float:
        ratio = rope.original_max_positions / (rotations * 2 * math.pi)
        return dim * math.log(ratio) / (2 * math.log(rope.theta))

    low, high = turning_dim(rope.beta_fast), turning_dim(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    high = high + 0.001 if low == high else high
    ramp = ((torch.arange(dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    wavelengths = rope.theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    kept = 1 - ramp
    return 1.0 / (rope.factor * wavelengths) * (1 - kept) + 1.0 / wavelengths * kept


def attention_scaling(rope: RopeSpec) -> float:
    """Factor on cos and sin: YaRN's temperature (section 3.4), else 1."""
    if rope.type != "yarn":
        return 1.0
    if rope.attention_factor is not None:
        return rope.attention_factor

    def scale(weight: float) -> float:
        return 1.0 if rope.factor <= 1 else 0.1 * weight * math.log(rope.factor) + 1.0

    if rope.mscale and rope.mscale_all_dim:
        return scale(rope.mscale) / scale(rope.mscale_all_dim)
    return scale(1)


def _dynamic_theta(rope: RopeSpec, dim: int, length: Tensor, max_positions: int) -> Tensor:
    """Base grown with the length; in float32 tensors, as transformers computes it."""
    stretch = (rope.factor * length / max_positions) - (rope.factor - 1)
    return rope.theta * stretch ** (dim / (dim - 2))


def frequencies(rope: RopeSpec, dim: int) -> Tensor:  # [dim / 2] float32
    """Inverse frequencies; for `dynamic` those within `max_position_embeddings`."""
    if rope.type == "linear":
        return _base_frequencies(rope.theta, dim) / rope.factor
    if rope.type == "llama3":
        return _llama3(rope, dim)
    if rope.type == "yarn":
        return _yarn(rope, dim)
    return _base_frequencies(rope.theta, dim)


def _cos_sin(angles: Tensor, scaling: float) -> Tensor:
    return torch.cat((angles.cos() * scaling, angles.sin() * scaling), dim=-1)


class RopeTable:
    """cos and sin for the tokens of a step: rows of one table, or computed for `dynamic`."""

    def __init__(
        self, rope: RopeSpec, dim: int, max_positions: int, table_len: int, device: torch.device
    ) -> None:
        self._rope, self._dim, self._max_positions = rope, dim, max_positions
        positions = torch.arange(table_len, dtype=torch.float32).unsqueeze(1)
        table = _cos_sin(positions * frequencies(rope, dim), attention_scaling(rope))
        self._table = table.to(device)

    @property
    def whole(self) -> Tensor | None:
        """The table, where every position's row of it is its own; None where lengths matter."""
        grows = self._rope.type == "dynamic" and len(self._table) > self._max_positions
        return None if grows else self._table

    def angles(self, positions: np.ndarray, prompt_lengths: np.ndarray) -> tuple[Tensor, Tensor]:
        """(cos_sin float32 [rows, dim], each token's row in it int64 [tokens])."""
        index = upload(positions, self._table.device)
        if self._rope.type != "dynamic":
            return self._table, index
        lengths = np.where(positions < prompt_lengths, prompt_lengths, positions + 1)
        if lengths.max() <= self._max_positions:
            return self._table, index
        clipped = torch.from_numpy(np.maximum(lengths, self._max_positions))
        distinct, place = torch.unique(clipped, return_inverse=True)
        bases = [_base_frequencies(self._theta(length), self._dim) for length in distinct]
        angles = torch.from_numpy(positions).float().unsqueeze(1) * torch.stack(bases)[place]
        own = torch.arange(len(positions), device=index.device)
        return _cos_sin(angles, 1.0).to(index.device), own

    def _theta(self, length: Tensor) -> float | Tensor:
        if int(length) <= self._max_positions:
            return self._rope.theta
        return _dynamic_theta(self._rope, self._dim, length, self._max_positions)
