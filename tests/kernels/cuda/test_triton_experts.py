"""A whole mixture by Triton agrees with the loop over experts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from phasewise.kernels import reference
from phasewise.kernels.cuda import experts
from phasewise.kernels.experts import by_loop, route

ERROR = {torch.float32: 1e-5, torch.bfloat16: 1.6e-2}  # of the largest value


@pytest.mark.parametrize("dtype", ERROR)
@pytest.mark.parametrize(("tokens", "renormalised"), [(1, False), (21, True)])
def test_a_mixture_agrees_with_the_loop_over_experts(
    interpreted: Any, dtype: torch.dtype, tokens: int, renormalised: bool
) -> None:
    generator = torch.Generator().manual_seed(tokens)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    x, gate_up, down = normal(tokens, 40), normal(5, 48, 40), normal(5, 40, 24)
    routing = route(normal(tokens, 5), 2, renormalised=renormalised)
    mine = interpreted(experts.mixture, x, gate_up, down, routing)
    wide = (x.float(), gate_up.float(), down.float())
    truth = by_loop(*wide, routing, reference.silu_mul)
    assert mine.dtype == dtype
    assert float((mine.float() - truth).abs().max() / truth.abs().max()) < ERROR[dtype]


def test_a_mixture_of_no_tokens_is_no_tokens(interpreted: Any) -> None:
    x, gate_up, down = torch.empty(0, 8), torch.ones(3, 8, 8), torch.ones(3, 8, 4)
    routing = route(torch.empty(0, 3), 2, renormalised=True)
    assert interpreted(experts.mixture, x, gate_up, down, routing).shape == (0, 8)
