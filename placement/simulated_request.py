"""A request on its way through a simulated cluster: where it is, and what is noted of it."""

from __future__ import annotations

from math import nan
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from ..engine.request import Request, SamplingParams
from ..engine.sequence import Sequence
from .network import Flow
from .simulated_run import StopRule
from .workload import Workload

if TYPE_CHECKING:
    from .simulated_decode import Lane, SimulatedDecode
    from .simulated_prefill import SimulatedPrefill


class SimulatedSequence(Sequence):
    """A sequence of lengths only, that knows its attempt."""

    __slots__ = ("attempt",)

    def __init__(
        self, request: Request, attempt: Attempt, num_tokens: int, hashes: list[int]
    ) -> None:
        """`hashes` name the prompt's full blocks, for prefix caches; read only."""
        self.id = request.id
        self.request = request
        self.tokens = None
        self.num_tokens = num_tokens
        self.num_prompt_tokens = request.num_prompt_tokens
        self.max_total_tokens = request.num_prompt_tokens + request.sampling.max_tokens
        self.num_computed = 0
        self.blocks = []
        self.block_hashes = hashes
        self.cached_tokens = 0
        self.num_preemptions = 0
        self.first_scheduled_s = None
        self.attempt = attempt


class Attempt:
    """One way of a request through the cluster; a lost worker ends it, and another begins."""

    __slots__ = (
        "blocks",
        "decode",
        "flow",
        "handed_s",
        "lane",
        "landed",
        "lost",
        "num_tokens",
        "prefill",
        "request",
        "row",
        "sequence",
        "told",
    )

    def __init__(self, row: int, request: Request, num_tokens: int, hashes: list[int]) -> None:
        self.row = row
        self.request = request
        self.num_tokens = num_tokens  # known when it began: the prompt, and what was delivered
        self.sequence = SimulatedSequence(request, self, num_tokens, hashes)
        self.prefill: SimulatedPrefill | None = None  # until its blocks there are free
        self.decode: SimulatedDecode | None = None
        self.lane: Lane | None = None  # where it has, or waits for, its blocks in decode
        self.blocks: list[int] | None = None  # leased in decode
        self.flow: Flow | None = None
        self.handed_s = nan  # prompt computed
        self.told = False  # decode knows that it shall go on
        self.landed = False  # its KV is there
        self.lost = False


class RequestMaker:
    """Requests of a workload's rows, made when they arrive."""

    def __init__(self, workload: Workload, block_size: int, *, with_prefixes: bool) -> None:
        self._prefix = workload.prefix if with_prefixes else None
        self._block_size = block_size
        self.prompts = workload.prompt_tokens.tolist()
        self.outputs = workload.output_tokens.tolist()
        self._sampling: dict[int, SamplingParams] = {}

    def attempt(self, row: int, arrival_s: float, delivered: int, number: int) -> Attempt:
        """The row's `number`-th attempt, with so many tokens delivered before."""
        output = self.outputs[row]
        sampling = self._sampling.get(output)
        if sampling is None:
            sampling = SamplingParams(max_tokens=output, ignore_eos=True)
            self._sampling[output] = sampling
        prompt = self.prompts[row]
        request = Request(
            id=f"{row}/{number}" if number else str(row),
            # Schedulers ask for the length only; a range has one without the tokens.
            token_ids=cast("tuple[int, ...]", range(prompt + delivered)),
            num_prompt_tokens=prompt,
            sampling=sampling,
            arrival_s=arrival_s,
        )
        return Attempt(row, request, prompt + delivered, self._hashes(row))

    def _hashes(self, row: int) -> list[int]:
        """A trace's id names many tokens; each of their blocks gets a name of its own."""
        if self._prefix is None:
            return []
        size, ids = self._block_size, self._prefix.of(row).tolist()
        blocks = self._prefix.block_tokens // size
        names = [name * blocks + i for name in ids for i in range(blocks)]
        return names[: self.prompts[row] // size]


class Notes:
    """What becomes a run's columns, and how many have missed their targets."""

    def __init__(self, workload: Workload, stop: StopRule | None) -> None:
        n = workload.num_requests
        self.arrival_s: list[float] = workload.arrival_s.tolist()
        self.outputs: list[int] = workload.output_tokens.tolist()
        self.first_s = [nan] * n
        self.last_s = [nan] * n
        self.queue_s = [nan] * n
        self.prefill_s = [nan] * n
        self.transfer_s = [0.0] * n
        self.preemptions = [0] * n
        self.failovers = [0] * n
        self.stop = stop
        self.misses = 0
        self._ttft_limit_s: list[float] = [] if stop is None else stop.ttft_s.tolist()
        self._tpot_limit_s: list[float] = [] if stop is None else stop.tpot_s.tolist()

    @property
    def hopeless(self) -> bool:
        return self.stop is not None and self.misses > self.stop.max_misses

    def first(self, row: int, at_s: float, now_s: float, started_s: float | None) -> None:
        """The client has its first token at `at_s`; later attempts have none."""
        if self.first_s[row] == self.first_s[row]:
            return
        assert started_s is not None, "a computed prompt was scheduled once"
        self.first_s[row] = at_s
        self.queue_s[row] = started_s - self.arrival_s[row]
        self.prefill_s[row] = now_s - started_s
        if self.stop is not None and self._late(row):
            self.misses += self.stop.first_row <= row < self.stop.last_row

    def last(self, row: int, at_s: float) -> None:
        self.last_s[row] = at_s
        if self.stop is not None and self.outputs[row] > 1 and not self._late(row):
            tpot_s = (at_s - self.first_s[row]) / (self.outputs[row] - 1)
            if tpot_s > self._tpot_limit_s[row]:
                self.misses += self.stop.first_row <= row < self.stop.last_row

    def columns(self) -> dict[str, Any]:
        arrival_s, first_s, last_s = map(np.array, (self.arrival_s, self.first_s, self.last_s))
        steps = np.array(self.outputs) - 1
        spread_s = np.where(steps > 0, last_s - first_s, last_s * 0.0)
        return {
            "ttft_s": first_s - arrival_s,
            "tpot_s": spread_s / np.maximum(steps, 1),
            "e2e_s": last_s - arrival_s,
            "queue_s": np.array(self.queue_s),
            "prefill_s": np.array(self.prefill_s),
            "transfer_s": np.array(self.transfer_s),
            "preemptions": np.array(self.preemptions, dtype=np.int32),
            "failovers": np.array(self.failovers, dtype=np.int32),
        }

    def _late(self, row: int) -> bool:
        return self.first_s[row] - self.arrival_s[row] > self._ttft_limit_s[row]
