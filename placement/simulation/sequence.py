"""Requests and sequences of lengths only, as simulated schedulers hold them."""

from __future__ import annotations

from functools import cache
from itertools import accumulate
from typing import cast

from ...engine.batch import StepOutput
from ...engine.request import Request, SamplingParams
from ...engine.sequence import Sequence
from ..workload.workload import Workload

NAME_BITS = 64  # of a block's name, as routers know it


@cache
def output_of(num_rows: int) -> StepOutput:
    """What a runner would return, of tokens without meaning."""
    return StepOutput(token_ids=[0] * num_rows)


class SimulatedRequest:
    """What a scheduler asks of a `Request`, without tokens and quick to make."""

    __slots__ = ("arrival_s", "id", "max_total_tokens", "num_prompt_tokens", "num_tokens")

    sampling = SamplingParams(ignore_eos=True)  # one for all: only the length ends them
    ttft_ms = 0.0  # the cluster's own targets hold
    tpot_ms = 0.0
    priority = 0
    cache_salt = ""

    def __init__(
        self, id: str, num_tokens: int, prompt: int, output: int, arrival_s: float
    ) -> None:
        self.id = id
        self.num_tokens = num_tokens
        self.num_prompt_tokens = prompt
        self.max_total_tokens = prompt + output
        self.arrival_s = arrival_s


class SimulatedSequence(Sequence):
    """A sequence of lengths only."""

    __slots__ = ()

    def __init__(self, request: SimulatedRequest, num_tokens: int, hashes: list[int]) -> None:
        """`hashes` name the prompt's full blocks, for prefix caches; read only."""
        self.id = request.id
        self.request = cast(Request, request)
        self.tokens = None
        self.num_tokens = num_tokens
        self.num_prompt_tokens = request.num_prompt_tokens
        self.max_total_tokens = request.max_total_tokens
        self.num_computed = 0
        self.blocks = []
        self.block_hashes = hashes
        self.cached_tokens = 0
        self.num_preemptions = 0
        self.first_scheduled_s = None

    def after_prefill(self) -> SimulatedSequence:
        """The same for a decode worker that waits for its KV: one token more is known."""
        request = cast(SimulatedRequest, self.request)
        return SimulatedSequence(request, request.num_tokens + 1, self.block_hashes)


class SequenceMaker:
    """Sequences of a workload's rows, made when they arrive."""

    def __init__(self, workload: Workload, block_size: int, *, with_prefixes: bool) -> None:
        self._prefix = workload.prefix if with_prefixes else None
        self._block_size = block_size
        self.prompts: list[int] = workload.prompt_tokens.tolist()
        self.outputs: list[int] = workload.output_tokens.tolist()

    def make(self, row: int, arrival_s: float, delivered: int, number: int) -> SimulatedSequence:
        """For the row's `number`-th attempt, with so many tokens delivered before."""
        prompt = self.prompts[row]
        name = f"{row}/{number}" if number else str(row)
        known = prompt + delivered
        request = SimulatedRequest(name, known, prompt, self.outputs[row], arrival_s)
        return SimulatedSequence(request, known, self._hashes(row) if self._prefix else [])

    def _hashes(self, row: int) -> list[int]:
        """A trace's id names many tokens, with all ids before it; each of their blocks gets a
        name of its own."""
        assert self._prefix is not None
        size, ids = self._block_size, self._prefix.of(row).tolist()
        blocks = self._prefix.block_tokens // size
        mask = (1 << NAME_BITS) - 1
        chained = accumulate(ids, lambda before, id: hash((before, id)) & mask, initial=0)
        next(chained)
        names = [(name * blocks + i) & mask for name in chained for i in range(blocks)]
        return names[: self.prompts[row] // size]
