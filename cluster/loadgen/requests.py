"""The requests of a workload as messages, ready to be sent: made before the clock starts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ...placement.workload.slo import SloPolicy
from ...placement.workload.workload import Workload
from ..proto import phasewise_pb2 as pb


def requests_of(
    workload: Workload, policy: SloPolicy, *, vocab_size: int, seed: int, timeout_s: float
) -> list[pb.GenerateRequest]:
    """One message a request: random token ids of the lengths asked for, no early end.

    Deterministic by seed. Prompts that share prefix ids in the trace share those tokens.
    """
    messages = []
    for row in range(workload.num_requests):
        name = _class_name(workload, row)
        targets = policy.of(name)
        messages.append(
            pb.GenerateRequest(
                token_ids=prompt_of(workload, row, vocab_size=vocab_size, seed=seed),
                max_tokens=int(workload.output_tokens[row]),
                temperature=0.0,
                ignore_eos=True,
                slo_class=name,
                ttft_ms=targets.ttft_s * 1e3,
                tpot_ms=targets.tpot_s * 1e3,
                timeout_s=timeout_s,
            )
        )
    return messages


def prompt_of(workload: Workload, row: int, *, vocab_size: int, seed: int) -> Sequence[int]:
    """Token ids of one prompt."""
    length = int(workload.prompt_tokens[row])
    own = np.random.default_rng([seed, row]).integers(0, vocab_size, length)
    if workload.prefix is not None:
        size = workload.prefix.block_tokens
        for place, block in enumerate(workload.prefix.of(row)[: length // size].tolist()):
            shared = np.random.default_rng([seed, 1 << 32, abs(block)])
            own[place * size : (place + 1) * size] = shared.integers(0, vocab_size, size)
    return own.tolist()


def _class_name(workload: Workload, row: int) -> str:
    ids = workload.class_ids
    return workload.class_names[0 if ids is None else ids[row]]
