"""What is done to logits between the model and the draw: edits, filters, inverse CDF.

Edits (bias, suppression, penalties) change single cells of `logits` [rows, vocab] in place; cells
come as parallel columns, so that all rows of a step are edited by one gather and one scatter.

Filters and draw work on *keys*: one int64 a token, its weight exp((logit - max) / temperature) in
fixed point above its token id (inverted, so that of two equal weights the smaller id has the
larger key). Keys of a row are all different, so top-k and top-p have no ties to break and every
filter is one threshold; and integer sums are exact in any order, so a row's token does not depend
on the rows beside it, on the number of threads or on how a device adds up.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

_RUN = 256  # neighbouring keys that a draw adds up before it looks at single ones


def add_bias(logits: Tensor, rows: Tensor, ids: Tensor, bias: Tensor) -> None:
    """Add `bias` [n] float32 to the cells (rows, ids) [n] int64. Cells must differ."""
    logits[rows, ids] += bias


def suppress(logits: Tensor, rows: Tensor, ids: Tensor) -> None:
    """Make the cells (rows, ids) [n] int64 impossible."""
    logits.index_put_((rows, ids), logits.new_full((), -torch.inf))


@dataclass(frozen=True, kw_only=True, slots=True)
class Penalties:
    """One entry a cell, float32 [n]."""

    repetition: Tensor
    frequency: Tensor
    presence: Tensor
    output_counts: Tensor  # how often the row's sequence has put this token out


def penalise(logits: Tensor, rows: Tensor, ids: Tensor, penalties: Penalties) -> None:
    """Penalise the cells (rows, ids) [n] int64. Cells must differ.

    Repetition: Keskar et al. 2019 (CTRL), section 4.1, in the form of transformers (a negative
    logit is multiplied); it takes every given cell as seen. Frequency and presence: the formula
    of OpenAI's API, over output tokens.
    """
    values = logits[rows, ids]
    repetition = penalties.repetition
    values = torch.where(values > 0, values / repetition, values * repetition)
    values -= penalties.frequency * penalties.output_counts
    values -= penalties.presence * (penalties.output_counts > 0)
    logits.index_put_((rows, ids), values)


class TokenCounts:
    """Distinct tokens of one stream and how often each was put out, kept up as it grows."""

    def __init__(self, num_prompt_tokens: int, *, with_prompt: bool) -> None:
        self._num_prompt_tokens = num_prompt_tokens
        self._num_seen = 0 if with_prompt else num_prompt_tokens
        self._slots: dict[int, int] = {}
        self._ids = np.empty(64, dtype=np.int64)
        self._counts = np.empty(64, dtype=np.float32)

    def update(self, tokens: list[int]) -> tuple[np.ndarray, np.ndarray]:
        """(ids int64 [n], times put out float32 [n]) for all of `tokens`, prompt first.

        Only what was added since the last call is looked at. The arrays are views, good until
        the next call.
        """
        for position in range(self._num_seen, len(tokens)):
            slot = self._slots.get(tokens[position])
            if slot is None:
                slot = self._add(tokens[position])
            self._counts[slot] += position >= self._num_prompt_tokens
        self._num_seen = max(self._num_seen, len(tokens))
        return self._ids[: len(self._slots)], self._counts[: len(self._slots)]

    def _add(self, token_id: int) -> int:
        slot = len(self._slots)
        if slot == len(self._ids):
            self._ids = np.concatenate((self._ids, np.empty_like(self._ids)))
            self._counts = np.concatenate((self._counts, np.empty_like(self._counts)))
        self._slots[token_id] = slot
        self._ids[slot], self._counts[slot] = token_id, 0
        return slot


@dataclass(frozen=True, slots=True)
class KeyFormat:
    """How weight and token id share the 62 bits of a key.

    Sums of weights over the vocabulary stay below 2**62, and the largest key below 2**63. With a
    vocabulary of 128,256 a weight has 45 bits: a token 3e-14 times as likely as the likeliest can
    still be drawn.
    """

    vocab_size: int

    @property
    def id_bits(self) -> int:
        return self.vocab_size.bit_length()

    @property
    def id_mask(self) -> int:
        return (1 << self.id_bits) - 1

    @property
    def one(self) -> int:
        """The weight of a row's likeliest token."""
        return 1 << (62 - self.id_bits)

    def keys(self, logits: Tensor, maxima: Tensor, temperatures: Tensor) -> Tensor:
        """Keys int64 [rows, vocab] of `logits`, which are overwritten; the others are [rows]."""
        # With the maximum taken off first, no temperature above zero overflows.
        temperatures = temperatures.clamp(min=torch.finfo(torch.float32).tiny)
        weights = logits.sub_(maxima[:, None]).div_(temperatures[:, None]).exp_()
        keys = weights.mul_(float(self.one)).to(torch.int64)
        ids = torch.arange(self.id_mask, self.id_mask - self.vocab_size, -1, device=logits.device)
        return keys.bitwise_left_shift_(self.id_bits).add_(ids)

    def weights(self, keys: Tensor) -> Tensor:
        return keys >> self.id_bits

    def token_ids(self, keys: Tensor) -> Tensor:
        return self.id_mask - (keys & self.id_mask)

    def min_p_floor(self, min_p: float) -> int:
        """Smallest key with a weight of at least `min_p` of the likeliest token's.

        Minh et al. 2024, "Turning up the heat: min-p sampling", section 3.
        """
        return int(np.ceil(min_p * self.one)) << self.id_bits

    def top_k(self, keys: Tensor, counts: Tensor, largest: int) -> Tensor:
        """The `counts` [rows] int64 largest keys of each row, in vocabulary order.

        Returns [rows, largest]; where a row keeps fewer, zeros (weight 0) fill it up.
        """
        kept = keys.topk(largest, dim=1).values
        place = torch.arange(largest, device=keys.device)
        kept = kept.masked_fill_(place >= counts[:, None], 0)
        return kept.gather(1, (kept & self.id_mask).argsort(dim=1, descending=True))

    def top_p_floor(self, keys: Tensor, floors: Tensor, top_p: Tensor) -> Tensor:
        """Smallest key of each row's nucleus, int64 [rows].

        The nucleus (Holtzman et al. 2020, section 3.1) is the smallest set of largest keys with
        `top_p` [rows] float64 of the weight of the keys that reach `floors` [rows]; never empty.
        """
        totals = self._kept_weights(keys, floors).sum(dim=1)
        needed = torch.ceil(top_p * totals).to(torch.int64).clamp_(min=1).minimum(totals)
        if keys.device.type == "cpu":
            # All keys below `bound` together weigh too little to be in the nucleus, so that a
            # fraction is left to sort. Elsewhere finding their number would stop the device.
            bounds = ((totals - needed) // keys.shape[1] + 1) << self.id_bits
            bounds = torch.maximum(bounds, floors)
            rows = zip(keys, bounds, floors, needed, strict=True)
            parts = [
                self.nucleus_floor(k[k >= bound][None], floor[None], need[None])
                for k, bound, floor, need in rows
            ]
            return torch.cat(parts)
        return self.nucleus_floor(keys, floors, needed)

    def nucleus_floor(self, keys: Tensor, floors: Tensor, needed: Tensor) -> Tensor:
        """Key at which the weights of the largest keys add up to `needed` [rows]."""
        if keys.shape[1] == 0:  # no weight at all: logits that were not finite
            return floors
        ordered = keys.sort(dim=1, descending=True).values
        reached = self._kept_weights(ordered, floors).cumsum(dim=1)
        last = torch.searchsorted(reached, needed[:, None]).clamp_(max=keys.shape[1] - 1)
        return torch.maximum(ordered.gather(1, last)[:, 0], floors)

    def draw(self, keys: Tensor, floors: Tensor, uniforms: Tensor) -> Tensor:
        """Token ids [rows] by inverse CDF over the keys that reach `floors`, in their order.

        `keys` [rows, n] stand in vocabulary order; `uniforms` [rows] float64 in [0, 1).
        """
        weights = self._kept_weights(keys, floors)
        sums = _run_sums(weights)  # [rows, runs]: adding up runs spares a scan of every key
        reached = sums.cumsum(dim=1)
        totals = reached[:, -1]
        targets = torch.minimum((uniforms * totals).to(torch.int64), totals - 1)[:, None]
        run = torch.searchsorted(reached, targets, right=True).clamp_(max=sums.shape[1] - 1)
        left = targets - (reached - sums).gather(1, run)
        last = keys.shape[1] - 1
        places = run * _RUN + torch.arange(_RUN, device=keys.device)
        within = weights.gather(1, places.clamp(max=last)).masked_fill_(places > last, 0)
        within = within.cumsum(dim=1)
        step = torch.searchsorted(within, left, right=True)
        return self.token_ids(keys.gather(1, (run * _RUN + step).clamp_(max=last))[:, 0])

    def _kept_weights(self, keys: Tensor, floors: Tensor) -> Tensor:
        return self.weights(keys).masked_fill_(keys < floors[:, None], 0)


def _run_sums(weights: Tensor) -> Tensor:
    """Sums over runs of `_RUN` neighbours; the last run is what is left (or one more of zero)."""
    whole = weights.shape[1] // _RUN * _RUN
    rest = weights[:, whole:].sum(dim=1, keepdim=True)
    if whole == 0:
        return rest
    runs = weights[:, :whole].unflatten(1, (-1, _RUN)).sum(dim=2)
    return torch.cat((runs, rest), dim=1)
