"""A mixture of experts agrees with the formula written out, and the choice with transformers'."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from phasewise.kernels.cpu_operators import CpuOperators
from phasewise.kernels.experts import Routing, by_loop, route
from phasewise.kernels.reference import silu_mul
from phasewise.kernels.torch_operators import TorchOperators
from torch import Tensor

transformers = pytest.importorskip("transformers")

TOKENS = [0, 1, 2, 33]


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(1)


def _weights(experts: int, hidden: int, inner: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(experts)
    gate_up = torch.randn(experts, 2 * inner, hidden, generator=generator)
    return gate_up, torch.randn(experts, hidden, inner, generator=generator)


def _written_out(x: Tensor, gate_up: Tensor, down: Tensor, logits: Tensor, chosen: int) -> Tensor:
    """Every token through every expert, in float64; weights outside the choice are 0."""
    probabilities = logits.double().softmax(-1)
    best = probabilities.topk(chosen).indices
    mask = torch.zeros_like(probabilities).scatter(1, best, 1.0)
    gate, up = torch.einsum("th,eoh->teo", x.double(), gate_up.double()).chunk(2, dim=-1)
    each = torch.einsum("tei,ehi->teh", F.silu(gate) * up, down.double())
    return (each * (probabilities * mask)[..., None]).sum(1)


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize(("experts", "chosen"), [(1, 1), (5, 2), (16, 3), (4, 4)])
def test_the_loop_over_experts_equals_the_formula(tokens: int, experts: int, chosen: int) -> None:
    gate_up, down = _weights(experts, 12, 7)
    x, logits = torch.randn(tokens, 12), torch.randn(tokens, experts)
    routing = route(logits, chosen, renormalised=False)
    out = by_loop(x, gate_up, down, routing, silu_mul)
    expected = _written_out(x, gate_up, down, logits, chosen)
    torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tokens", TOKENS)
def test_a_routing_lists_every_slot_once_by_expert(tokens: int) -> None:
    logits = torch.randn(tokens, 6)
    logits[:, 4] = -torch.inf  # an expert that nobody chooses
    routing = route(logits, 2, renormalised=True)
    best = logits.topk(2).indices
    assert sorted(routing.places.flatten().tolist()) == list(range(2 * tokens))
    for token in range(tokens):
        for place, expert in zip(routing.places[token], best[token], strict=True):
            assert routing.rows[place] == token
            assert routing.starts[expert] <= place < routing.starts[expert + 1]
    assert routing.starts[4] == routing.starts[5] and routing.starts[6] == 2 * tokens
    shares = routing.factors[routing.places].sum(1)
    torch.testing.assert_close(shares, torch.ones(tokens))


@pytest.mark.parametrize("renormalised", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts_and_their_weights_are_those_of_transformers_even_where_they_tie(
    dtype: torch.dtype, renormalised: bool
) -> None:
    sizes = {"hidden_size": 8, "num_experts": 40, "num_experts_per_tok": 6}
    config = transformers.Qwen3MoeConfig(norm_topk_prob=renormalised, **sizes)
    router = transformers.models.qwen3_moe.modeling_qwen3_moe.Qwen3MoeTopKRouter(config).to(dtype)
    generator = torch.Generator().manual_seed(1)
    # Whole numbers of few values: most tokens have several experts at the edge of the choice.
    weight = torch.randint(-1, 2, (40, 8), generator=generator)
    x = torch.randint(-1, 2, (50, 8), generator=generator).to(dtype)
    with torch.no_grad():
        router.weight.copy_(weight)
        logits, scores, indices = router(x)
    routing = route(logits, 6, renormalised=renormalised)
    assert torch.equal(_experts_of(routing), indices)
    assert torch.equal(routing.factors[routing.places].to(dtype), scores)


def _experts_of(routing: Routing) -> Tensor:  # [tokens, chosen]
    return torch.searchsorted(routing.starts, routing.places, right=True) - 1


@pytest.mark.parametrize("tokens", TOKENS)
def test_operators_on_cpu_agree_in_both_dtypes(tokens: int) -> None:
    gate_up, down = _weights(5, 16, 8)
    x, logits = torch.randn(tokens, 16), torch.randn(tokens, 5)
    routing = route(logits, 2, renormalised=True)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
        own = [tensor.to(dtype) for tensor in (x, gate_up, down)]
        exact = by_loop(*(tensor.float() for tensor in own), routing, silu_mul)
        for ops in (CpuOperators(dtype, 2, 16, 1), TorchOperators()):
            out = ops.experts(*own, routing)
            assert out.dtype == dtype
            scale = float(exact.abs().max()) if tokens else 1.0
            assert torch.allclose(out.float() / scale, exact / scale, atol=tolerance)
