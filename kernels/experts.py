"""A mixture of experts: the router's choice, and the readable way through the chosen experts.

A slot is a token at one of its experts. Slots lie expert after expert, so that each expert's
matrices are read once, and those of an expert that nobody chose never.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Routing:
    """Which experts a layer's tokens go through, and with what weights."""

    rows: Tensor  # int32 [slots]: the slot's token
    starts: Tensor  # int32 [experts + 1]: expert e has the slots [starts[e], starts[e + 1])
    factors: Tensor  # float32 [slots]: weight of the slot in its token's sum
    places: Tensor  # int64 [tokens, chosen]: the token's slots, best expert first


def route(logits: Tensor, chosen: int, *, renormalised: bool) -> Routing:
    """The `chosen` best experts of each token by logits [tokens, experts].

    Weights are float32 probabilities over all experts (Shazeer et al. 2017, with the softmax before
    the choice as in Mixtral and Qwen3-MoE), or with `renormalised` their shares among the chosen.
    Among equal probabilities `topk` decides, as it does in transformers. Nothing waits for the
    device and no shape depends on the choice: a CUDA graph may hold it.
    """
    tokens, experts = logits.shape
    probabilities = torch.softmax(logits, dim=-1, dtype=torch.float32)
    factors, choice = probabilities.topk(chosen, dim=-1)
    if renormalised:
        factors = factors / factors.sum(dim=-1, keepdim=True)
    by_expert, order = choice.view(-1).sort(stable=True)
    places = torch.empty_like(order)
    places[order] = torch.arange(len(order), device=order.device)
    bounds = torch.arange(experts + 1, device=order.device)
    return Routing(
        rows=(order // chosen).int(),
        starts=torch.searchsorted(by_expert, bounds, out_int32=True),
        factors=factors.view(-1)[order],
        places=places.view(tokens, chosen),
    )


def by_loop(
    x: Tensor,  # [tokens, hidden]
    gate_up: Tensor,  # [experts, 2 * inner, hidden]
    down: Tensor,  # [experts, hidden, inner]
    routing: Routing,
    silu_mul: Callable[[Tensor], Tensor],
) -> Tensor:  # [tokens, hidden]
    """Weighted sums over each token's experts, one expert after another.

    Weights are rounded to x's dtype, sums are float32 and rounded once: what takes the sums reads
    each expert's result where it lies.
    """
    spans = [
        (expert, begin, end)
        for expert, (begin, end) in enumerate(pairwise(routing.starts.tolist()))
        if begin < end
    ]
    inner = silu_mul(_matmul(x[routing.rows], gate_up, spans))
    out = _matmul(inner, down, spans)
    factors = routing.factors[routing.places].to(x.dtype)
    return F.embedding_bag(routing.places, out, mode="sum", per_sample_weights=factors)


def _matmul(x: Tensor, weights: Tensor, spans: list[tuple[int, int, int]]) -> Tensor:
    """x[begin:end] @ weights[expert].T for every (expert, begin, end)."""
    out = x.new_empty((len(x), weights.shape[1]))
    for expert, begin, end in spans:
        torch.mm(x[begin:end], weights[expert].t(), out=out[begin:end])
    return out
