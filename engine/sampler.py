"""Chooses the next token of every row of a step.

The token is a function of the row's logits, the sequence's tokens and (seed, position), and of
nothing else: not of the rows beside it, nor of the worker, nor of what this object remembers. What
it remembers (a sequence's plan and token counts) only saves work, is rebuilt from the sequence
when missing, and goes when the sequence goes.

Order of work, as in vLLM: logit_bias, min_tokens, penalties, temperature, min_p, top_k, top_p,
draw.
The device is waited for once, when the chosen ids are read (and then the log-probabilities, where
a row asked for them).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from .decode_slots import GREEDY, Draw, signed64
from .draws import uniforms
from .errors import PhasewiseError
from .logits import (
    KeyFormat,
    Penalties,
    TokenCounts,
    add_bias,
    penalise,
    suppress,
)
from .request import SamplingParams, TokenLogprobs
from .sequence import Sequence
from .upload import upload

# Cells worked on at a time: on a CPU what its cache holds, elsewhere what memory can spare.
_CPU_CELLS = 1 << 18
_DEVICE_CELLS = 1 << 24
_BROKEN = -1


class BrokenLogits(PhasewiseError):
    """The model gave a row from which nothing can be chosen: NaN, +inf, or -inf throughout."""

    def __init__(self, sequences: list[Sequence], positions: list[int]) -> None:
        pairs = zip(sequences, positions, strict=True)
        places = ", ".join(f"{s.id} at position {position}" for s, position in pairs)
        super().__init__(
            f"logits: NaN, +inf or nothing but -inf ({places}); the checkpoint is damaged or its "
            "dtype overflows: verify the files and try float32"
        )
        self.sequence_ids = [s.id for s in sequences]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Plan:
    """What one sequence's sampling parameters ask for, worked out once."""

    plain: bool  # greedy with nothing else: the argmax is the answer
    greedy: bool
    penalised: bool
    bias_ids: np.ndarray  # int64
    bias: np.ndarray  # float32
    stop_ids: np.ndarray  # int64, impossible until min_tokens are there
    min_p_floor: int
    counts: TokenCounts | None  # kept only where penalties need them


@dataclass(frozen=True, kw_only=True, slots=True)
class _Row:
    """A row that needs more than the argmax."""

    index: int
    sequence: Sequence
    plan: _Plan
    position: int  # of the token to choose

    @property
    def sampling(self) -> SamplingParams:
        return self.sequence.request.sampling


@dataclass(frozen=True, kw_only=True, slots=True)
class _Likelihoods:
    """Raw logits of the rows that asked for log-probabilities, before anything edits them."""

    rows: list[_Row]
    indices: Tensor  # int64 [n]
    logits: Tensor  # float32 [n, vocab]


class Sampler:
    """Samples for one model. `eos_token_ids` end a stream unless its request ignores them."""

    def __init__(self, vocab_size: int, eos_token_ids: frozenset[int]) -> None:
        self._vocab_size = vocab_size
        self._eos_token_ids = eos_token_ids
        self._format = KeyFormat(vocab_size)
        self._plans: WeakKeyDictionary[Sequence, _Plan] = WeakKeyDictionary()

    @torch.inference_mode()
    def sample(
        self, logits: Tensor, sequences: list[Sequence], positions: list[int] | None = None
    ) -> tuple[list[int], list[TokenLogprobs | None] | None]:
        """Next token of each sequence, and log-probabilities where a row asked for them.

        `logits` [rows, vocab] float32 is overwritten; row i belongs to `sequences[i]`, whose next
        token stands at `positions[i]`, behind its last known one by default. The second result
        is None when no row asked.
        Raises BrokenLogits, naming the sequences, when a row has no finite maximum. That is found
        from the value at the argmax, which comes with the ids and costs no wait of its own.
        """
        assert logits.shape == (len(sequences), self._vocab_size), "one row of logits a sequence"
        if not sequences:
            return [], None
        if positions is None:
            positions = [sequence.num_tokens for sequence in sequences]
        busy = self._busy_rows(sequences, positions)
        likelihoods = _likelihoods(logits, busy)
        _edit(logits, busy)
        if not busy and logits.device.type == "cpu":
            return _whole(_likeliest(logits.numpy()), sequences, positions), None
        chosen = logits.argmax(dim=1)
        maxima = logits.gather(1, chosen[:, None])[:, 0]
        self._draw(logits, maxima, busy, chosen)
        chosen.masked_fill_(~maxima.isfinite(), _BROKEN)
        token_ids = _whole(chosen.tolist(), sequences, positions)
        if likelihoods is None:
            return token_ids, None
        return token_ids, _logprobs(likelihoods, chosen)

    def draw_of(self, sequence: Sequence) -> Draw | None:
        """How a device may choose the sequence's tokens without the host; None where logits are
        edited or their likelihoods are asked for."""
        plan, sampling = self._plan_of(sequence), sequence.request.sampling
        if plan.plain:
            return GREEDY
        edited = plan.penalised or len(plan.bias_ids) or len(plan.stop_ids)
        if edited or sampling.logprobs is not None:
            return None
        return Draw(
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            floor=plan.min_p_floor,
            seed=sampling.seed,
        )

    def _busy_rows(self, sequences: list[Sequence], positions: list[int]) -> list[_Row]:
        rows = []
        for index, sequence in enumerate(sequences):
            plan = self._plans.get(sequence) or self._plan_of(sequence)
            if not plan.plain:
                position = positions[index]
                rows.append(_Row(index=index, sequence=sequence, plan=plan, position=position))
        return rows

    def _plan_of(self, sequence: Sequence) -> _Plan:
        plan = self._plans.get(sequence)
        if plan is None:
            plan = self._plans[sequence] = self._plan(sequence)
        return plan

    def _plan(self, sequence: Sequence) -> _Plan:
        sampling = sequence.request.sampling
        bias_ids = np.array(list(sampling.logit_bias), dtype=np.int64)
        in_vocabulary = (bias_ids >= 0) & (bias_ids < self._vocab_size)
        assert in_vocabulary.all(), "the front door refuses a logit_bias outside the vocabulary"
        stop_ids = set(sampling.stop_token_ids)
        if not sampling.ignore_eos:
            stop_ids |= self._eos_token_ids
        stop_ids = {i for i in stop_ids if 0 <= i < self._vocab_size} if sampling.min_tokens else ()
        repeated = sampling.repetition_penalty != 1
        penalised = repeated or bool(sampling.presence_penalty or sampling.frequency_penalty)
        greedy = sampling.temperature == 0
        edited = bool(penalised or len(bias_ids) or stop_ids)
        return _Plan(
            plain=greedy and not edited and sampling.logprobs is None,
            greedy=greedy,
            penalised=penalised,
            bias_ids=bias_ids,
            bias=np.array(list(sampling.logit_bias.values()), dtype=np.float32),
            stop_ids=np.array(sorted(stop_ids), dtype=np.int64),
            min_p_floor=self._format.min_p_floor(sampling.min_p),
            counts=TokenCounts(sequence.num_prompt_tokens, with_prompt=repeated)
            if penalised
            else None,
        )

    def _draw(self, logits: Tensor, maxima: Tensor, busy: list[_Row], chosen: Tensor) -> None:
        """Write the drawn rows' tokens into `chosen`, rows with the same filters together."""
        cells = _CPU_CELLS if logits.device.type == "cpu" else _DEVICE_CELLS
        size = max(1, cells // self._vocab_size)
        groups: dict[tuple[bool, bool], list[_Row]] = {}
        for row in busy:
            if not row.plan.greedy:
                filters = (0 < row.sampling.top_k < self._vocab_size, row.sampling.top_p < 1)
                groups.setdefault(filters, []).append(row)
        for (top_k, top_p), rows in groups.items():
            for start in range(0, len(rows), size):
                part = rows[start : start + size]
                indices = _indices(part, logits.device)
                token_ids = self._draw_rows(
                    logits.index_select(0, indices),
                    maxima.index_select(0, indices),
                    part,
                    top_k=top_k,
                    top_p=top_p,
                )
                chosen.index_copy_(0, indices, token_ids)

    def _draw_rows(
        self, logits: Tensor, maxima: Tensor, rows: list[_Row], *, top_k: bool, top_p: bool
    ) -> Tensor:
        """Token ids [n] for `rows`, whose logits [n, vocab] are overwritten."""

        def column(of: Callable[[_Row], float], dtype: type) -> Tensor:
            return upload(np.array([of(row) for row in rows], dtype=dtype), logits.device)

        form = self._format
        if logits.device.type == "cuda":  # as decode graphs draw, so that neighbours do not matter
            from ..kernels.cuda import sampling  # Triton, where there is a GPU

            return sampling.draw(
                sampling.keys(logits, maxima, column(lambda r: r.sampling.temperature, np.float64)),
                column(lambda r: r.plan.min_p_floor, np.int64),
                column(lambda r: r.sampling.top_k, np.int64),
                column(lambda r: r.sampling.top_p, np.float64),
                column(lambda r: signed64(r.sampling.seed), np.int64),
                column(lambda r: r.position, np.int64),
            )
        keys = form.keys(logits, maxima, column(lambda r: r.sampling.temperature, np.float32))
        floors = column(lambda r: r.plan.min_p_floor, np.int64)
        if top_k:
            largest = max(row.sampling.top_k for row in rows)
            keys = form.top_k(keys, column(lambda r: r.sampling.top_k, np.int64), largest)
        if top_p:
            floors = form.top_p_floor(keys, floors, column(lambda r: r.sampling.top_p, np.float64))
        drawn = uniforms([row.sampling.seed for row in rows], [row.position for row in rows])
        return form.draw(keys, floors, upload(drawn, logits.device))


def _likeliest(logits: np.ndarray) -> list[int]:
    """Each row's argmax, or _BROKEN. NumPy compares whole vectors where torch goes value by value:
    10 to 20 times faster. Of equals the first; a NaN is the largest, as in torch."""
    chosen = logits.argmax(axis=1)
    maxima = logits[np.arange(len(chosen)), chosen]
    chosen[~np.isfinite(maxima)] = _BROKEN
    return chosen.tolist()


def _whole(token_ids: list[int], sequences: list[Sequence], positions: list[int]) -> list[int]:
    """The ids, none of which is _BROKEN. Raises BrokenLogits."""
    if _BROKEN in token_ids:
        broken = [row for row, token_id in enumerate(token_ids) if token_id == _BROKEN]
        raise BrokenLogits([sequences[row] for row in broken], [positions[row] for row in broken])
    return token_ids


def _indices(rows: list[_Row], device: torch.device) -> Tensor:
    return upload(np.array([row.index for row in rows], dtype=np.int64), device)


def _edit(logits: Tensor, busy: list[_Row]) -> None:
    """Bias, min_tokens and penalties, in place, on the rows that have them."""
    device = logits.device
    biased = [row for row in busy if len(row.plan.bias_ids)]
    if biased:
        cells = _cells(biased, [row.plan.bias_ids for row in biased], device)
        bias = np.concatenate([row.plan.bias for row in biased])
        add_bias(logits, *cells, upload(bias, device))
    early = [
        row
        for row in busy
        if len(row.plan.stop_ids) and row.sequence.num_output_tokens < row.sampling.min_tokens
    ]
    if early:
        suppress(logits, *_cells(early, [row.plan.stop_ids for row in early], device))
    penalised = [row for row in busy if row.plan.penalised]
    if penalised:
        _penalise(logits, penalised)


def _penalise(logits: Tensor, rows: list[_Row]) -> None:
    ids, counts = [], []
    for row in rows:
        assert row.plan.counts is not None and row.sequence.tokens is not None
        row_ids, row_counts = row.plan.counts.update(row.sequence.tokens)
        ids.append(row_ids)
        counts.append(row_counts)

    def spread(values: list[float]) -> Tensor:
        column = np.array(values, dtype=np.float32)
        return upload(np.repeat(column, [len(i) for i in ids]), logits.device)

    penalties = Penalties(
        repetition=spread([row.sampling.repetition_penalty for row in rows]),
        frequency=spread([row.sampling.frequency_penalty for row in rows]),
        presence=spread([row.sampling.presence_penalty for row in rows]),
        output_counts=upload(np.concatenate(counts), logits.device),
    )
    penalise(logits, *_cells(rows, ids, logits.device), penalties)


def _cells(rows: list[_Row], ids: list[np.ndarray], device: torch.device) -> tuple[Tensor, Tensor]:
    """Columns (row, token id), int64 [n], of the cells that `ids` name in each row."""
    indices = np.repeat([row.index for row in rows], [len(i) for i in ids])
    return upload(indices, device), upload(np.concatenate(ids), device)


def _likelihoods(logits: Tensor, busy: list[_Row]) -> _Likelihoods | None:
    rows = [row for row in busy if row.sampling.logprobs is not None]
    if not rows:
        return None
    indices = _indices(rows, logits.device)
    return _Likelihoods(rows=rows, indices=indices, logits=logits.index_select(0, indices))


def _logprobs(likelihoods: _Likelihoods, chosen: Tensor) -> list[TokenLogprobs | None]:
    """One entry a row of the step: the chosen token's log-probability and the likeliest tokens'."""
    log_probabilities = likelihoods.logits.log_softmax(dim=1)
    sampled = log_probabilities.gather(1, chosen[likelihoods.indices][:, None])[:, 0].tolist()
    counts = [row.sampling.logprobs or 0 for row in likelihoods.rows]
    top = log_probabilities.topk(min(max(counts), log_probabilities.shape[1]), dim=1)
    top_ids, top_values = top.indices.tolist(), top.values.tolist()
    result: list[TokenLogprobs | None] = [None] * len(chosen)
    for place, (row, count) in enumerate(zip(likelihoods.rows, counts, strict=True)):
        result[row.index] = TokenLogprobs(
            sampled=sampled[place],
            top_ids=tuple(top_ids[place][:count]),
            top=tuple(top_values[place][:count]),
        )
    return result
