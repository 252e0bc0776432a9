"""What a worker says about how full it is. Sent with every message, so cheap to make."""

from __future__ import annotations

from typing import NamedTuple

from .blocks import BlockCounts


class SchedulerLoad(NamedTuple):
    """A scheduler's numbers at one moment. Finished, parked prompts show only in `blocks`."""

    running: int  # sequences that hold a place in the batch
    waiting: int  # sequences queued, whatever they wait for
    queued_tokens: int  # tokens that chunks have yet to compute, of waiting and running ones
    context_tokens: int  # tokens whose KV is held for running sequences
    preemptions: int  # since the worker started
    blocks: BlockCounts
    hit_tokens: int = 0  # found in the prefix cache by sequences that were admitted
    asked_tokens: int = 0  # of all sequences that were admitted to be computed
