"""What a decode worker's configuration asks of its scheduler."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class DecodeLimits:
    """What bounds a step, and what a request gets that names no target of its own."""

    max_batch_size: int  # sequences with a row
    max_batch_tokens: int  # of a step, rows and chunks; more than max_batch_size
    max_model_len: int
    eos_token_ids: frozenset[int] = frozenset()
    ttft_ms: float = 0.0  # the cluster's own targets; 0: none
    tpot_ms: float = 0.0
    max_wait_s: float = 10.0  # the age bound of admission
