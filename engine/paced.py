"""A runner that takes the time named hardware would, and computes nothing: for rehearsals.

Scheduler, handoff and transfer are the real ones around it. Its tokens are a function of (prompt,
position), drawn from what stands in the KV pool: the slot of position p holds, in every layer, a
running sum over the tokens up to p. So a stream that went over a handoff, a failover or a
preemption is right only where the right KV arrived. Knows neither torch nor ray.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from collections.abc import Sequence as Tokens
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from .batch import Batch, StepOutput, Underway
from .layout import KVLayout
from .request import TokenLogprobs
from .sequence import Sequence
from .spec import ModelSpec
from .step_time import StepTime, features_of

LATE_S = 0.05  # a step asked for later than this after the one before took a pause
MOST_LAYERS = 8  # of a paced pool: one stands for several of the model's
_BASE = 0x9E3779B97F4A7C15  # odd: its powers never vanish modulo 2^64
_MASK = (1 << 64) - 1

Words = NDArray[np.uint64]


def paced_layout(
    *, num_layers: int, num_blocks: int, block_size: int, fingerprint: str
) -> KVLayout:
    """Eight bytes a position and layer, whatever the model's own KV takes."""
    return KVLayout(
        num_layers=min(num_layers, MOST_LAYERS),
        num_blocks=num_blocks,
        num_kv_heads=1,
        block_size=block_size,
        head_dim=1,
        dtype="float32",
        fingerprint=fingerprint,
    )


class PacedRunner:
    """Has what `ComputeThread` asks of a runner. One caller at a time.

    Steps form one schedule: a step with a row that was there when the one before ended begins at
    that end, though it is asked for later (up to `LATE_S`). So neither late wake-ups nor the
    worker's own work between two steps add up, and what has come meanwhile never begins before it
    came. Real hardware hides that work, or its step times were measured with it. Nothing spins: a
    core carries many paced workers.
    """

    def __init__(
        self,
        spec: ModelSpec,
        layout: KVLayout,
        buffer: Any,
        step_time: StepTime,
        *,
        max_model_len: int,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """`buffer` holds the pool's bytes and outlives this object. `clock` is the one of
        `Request.arrival_s`."""
        self.spec = spec
        self.layout = layout
        self.max_model_len = max_model_len
        self._step_time = step_time
        self._clock = clock
        self._sleep = sleep
        self._ended_s = float("-inf")  # when the latest step should have ended
        shape = (layout.num_layers, layout.num_blocks, layout.block_size)
        words = np.frombuffer(buffer, np.uint64, count=layout.num_bytes // 8)
        self._pool = words.reshape(shape)
        salts = [_mix(layer + 1) for layer in range(layout.num_layers)]
        self._salts = np.array(salts, np.uint64)[:, None]  # [layers, 1]: layers differ
        base = np.full(max_model_len, _BASE, np.uint64)
        base[0] = 1
        self._powers = np.cumprod(base, dtype=np.uint64)
        self._eos = sorted(i for i in spec.eos_token_ids if 0 <= i < spec.vocab_size)
        self._known: WeakKeyDictionary[Sequence, int] = WeakKeyDictionary()

    def run(self, batch: Batch, layer_done: Callable[[int], None] | None = None) -> StepOutput:
        """The batch's tokens after its time; `layer_done` in equal parts of it."""
        return self.begin(batch, layer_done)

    def begin(
        self,
        batch: Batch,
        layer_done: Callable[[int], None] | None = None,
        former: StepOutput | Underway | None = None,
    ) -> StepOutput:
        """As `run`; `former` is what the step before returned, if the batch follows it."""
        assert former is None or isinstance(former, StepOutput), "a paced step ends as it returns"
        now_s = self._clock()
        late = 0 <= now_s - self._ended_s < LATE_S and self._was_waited_for(batch)
        began_s = self._ended_s if late else now_s
        seconds = self._step_time.batch_s(features_of(batch))
        output = self._compute(batch, former)
        if layer_done is not None:
            for layer in range(self.layout.num_layers):
                self._wait(began_s + seconds * (layer + 1) / self.layout.num_layers)
                layer_done(layer)
        self._ended_s = began_s + seconds
        self._wait(self._ended_s)
        return output

    def check_ranks(self) -> None:
        """It has none: a tensor-parallel group is only pretended."""

    def close(self) -> None:
        """Holds nothing."""

    def _was_waited_for(self, batch: Batch) -> bool:
        """Whether a row of the batch was there when the latest step should have ended: it goes on
        from a step of this runner, or its prompt had come. Others may have come later."""
        for sequence, start in zip(batch.sequences, batch.starts, strict=True):
            if start and self._known.get(sequence) == start:
                return True
            own = start == sequence.cached_tokens  # else others computed the prompt
            if own and sequence.request.arrival_s <= self._ended_s:
                return True
        return False

    def _wait(self, until_s: float) -> None:
        left_s = until_s - self._clock()
        if left_s > 0:
            self._sleep(left_s)

    def _compute(self, batch: Batch, former: StepOutput | None) -> StepOutput:
        """Write the batch's sums into its blocks and draw tokens where rows end."""
        sums = np.zeros(batch.num_rows, np.uint64)  # at each row's last position
        single = []
        for row, (sequence, start, count) in enumerate(
            zip(batch.sequences, batch.starts, batch.counts, strict=True)
        ):
            if self._known.get(sequence, 0) != start or start == 0:
                self._check(sequence, start)
            self._known[sequence] = start + count
            if count == 1 and start:
                single.append(row)
            else:
                sums[row] = self._chunk(sequence, start, count)
        if single:
            sequences = [batch.sequences[row] for row in single]
            starts = [batch.starts[row] for row in single]
            if former is None:
                tokens = [_tokens_of(s)[i] for s, i in zip(sequences, starts, strict=True)]
            else:
                tokens = batch.tokens_of(former)
            sums[single] = self._rows(sequences, starts, tokens)
        drawn = self._tokens(sums).tolist()
        chosen = [token if batch.samples(row) else -1 for row, token in enumerate(drawn)]
        return StepOutput(token_ids=chosen, logprobs=_logprobs(batch, chosen))

    def _rows(self, sequences: list[Sequence], starts: list[int], tokens: list[int]) -> Words:
        """One position a row, all rows at once; their sums."""
        positions = np.array(starts)
        terms = (np.array(tokens, np.uint64) + np.uint64(1)) * self._powers[positions]
        size = self.layout.block_size
        before = [s.blocks[(i - 1) // size] for s, i in zip(sequences, starts, strict=True)]
        here = [s.blocks[i // size] for s, i in zip(sequences, starts, strict=True)]
        found = self._pool[:, before, (positions - 1) % size] ^ self._salts
        assert (found == found[0]).all(), "a position's KV is there in every layer"
        sums = found[0] + terms
        self._pool[:, here, positions % size] = sums ^ self._salts
        return sums

    def _chunk(self, sequence: Sequence, start: int, count: int) -> np.uint64:
        """Positions `[start, start + count)`; the sum at the last."""
        before = np.uint64(0)
        if start:
            before = self._slots(sequence, start - 1, start)[0, 0]
        sums = np.cumsum(self._terms(sequence, start, start + count)) + before
        blocks, offsets = self._places(sequence, start, start + count)
        self._pool[:, blocks, offsets] = sums ^ self._salts
        return sums[-1]

    def _check(self, sequence: Sequence, start: int) -> None:
        """A sequence that others computed up to `start`: its KV must be its own, throughout."""
        if start:
            expected = np.cumsum(self._terms(sequence, 0, start))
            found = self._slots(sequence, 0, start)
            assert (found == expected).all(), f"the KV of {sequence.id} is not its own"

    def _terms(self, sequence: Sequence, start: int, end: int) -> Words:
        tokens = np.array(_tokens_of(sequence)[start:end], np.uint64)
        return (tokens + np.uint64(1)) * self._powers[start:end]

    def _slots(self, sequence: Sequence, start: int, end: int) -> Words:  # [layers, positions]
        blocks, offsets = self._places(sequence, start, end)
        return self._pool[:, blocks, offsets] ^ self._salts

    def _places(
        self, sequence: Sequence, start: int, end: int
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        size = self.layout.block_size
        positions = np.arange(start, end)
        first = start // size
        table = np.array(sequence.blocks[first : -(-end // size)])
        return table[positions // size - first], positions % size

    def _tokens(self, sums: Words) -> NDArray[np.int64]:
        """Never an end-of-sequence token, so that streams have the lengths asked for."""
        choices = np.uint64(self.spec.vocab_size - len(self._eos))
        ids = (_mix_words(sums) % choices).astype(np.int64)
        for eos in self._eos:
            ids += ids >= eos
        return ids


def _tokens_of(sequence: Sequence) -> list[int]:
    assert sequence.tokens is not None, "a simulated sequence has no tokens"
    return sequence.tokens


def continuation(
    prompt: Tokens[int], num_tokens: int, *, vocab_size: int, eos_token_ids: frozenset[int]
) -> list[int]:
    """The stream that a paced cluster answers `prompt` with: the readable reference."""
    eos = sorted(i for i in eos_token_ids if 0 <= i < vocab_size)
    tokens = list(prompt)
    total = sum((token + 1) * pow(_BASE, i, 1 << 64) for i, token in enumerate(tokens)) & _MASK
    while len(tokens) < len(prompt) + num_tokens:
        token = _mix(total) % (vocab_size - len(eos))
        for end in eos:
            token += token >= end
        total = (total + (token + 1) * pow(_BASE, len(tokens), 1 << 64)) & _MASK
        tokens.append(token)
    return tokens[len(prompt) :]


def _mix(value: int) -> int:
    """Spread 64 bits over 64 bits (splitmix64's finaliser, Steele et al., OOPSLA '14)."""
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB & _MASK
    return value ^ (value >> 31)


def _mix_words(values: Words) -> Words:
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _logprobs(batch: Batch, tokens: list[int]) -> list[TokenLogprobs | None] | None:
    """The token drawn is certain; nothing else is likely."""
    asked = [sequence.request.sampling.logprobs for sequence in batch.sequences]
    if all(count is None for count in asked):
        return None
    return [
        None
        if count is None or token < 0
        else TokenLogprobs(
            sampled=0.0, top_ids=(token,) if count else (), top=(0.0,) if count else ()
        )
        for count, token in zip(asked, tokens, strict=True)
    ]
