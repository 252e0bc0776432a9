"""A mixture of experts on CPU, router included: transformers' own block against ours, by batch.

    python benchmarks/experts.py [--threads 1] [--experts 64] [--chosen 8] [--json]

Weights are random, so that tokens spread over the experts. transformers runs as it does by default
(`grouped_mm`). Both sides take the same input in turn; times are medians. Above 1 ours is faster.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
import transformers
from phasewise.kernels.cpu_operators import CpuOperators
from phasewise.kernels.experts import route
from torch import Tensor
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

HIDDEN, INNER = 1024, 384
BATCHES = (1, 4, 16, 64, 512)
ROUNDS = 9


def make_block(experts: int, chosen: int, dtype: torch.dtype) -> Qwen3MoeSparseMoeBlock:
    config = transformers.Qwen3MoeConfig(
        hidden_size=HIDDEN,
        moe_intermediate_size=INNER,
        num_experts=experts,
        num_experts_per_tok=chosen,
        norm_topk_prob=True,
    )
    config._experts_implementation = "grouped_mm"
    block = Qwen3MoeSparseMoeBlock(config).to(dtype).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in block.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return block


def ours(block: Qwen3MoeSparseMoeBlock, chosen: int, operators: CpuOperators, x: Tensor) -> Tensor:
    routing = route(F.linear(x, block.gate.weight), chosen, renormalised=True)
    experts = block.experts
    return operators.experts(x, experts.gate_up_proj, experts.down_proj, routing)


def medians_ms(sides: list[Callable[[], Tensor]]) -> list[float]:
    """Of each side, run in turn."""
    times: list[list[float]] = [[] for _ in sides]
    for round_ in range(ROUNDS + 1):
        for side, taken in zip(sides, times, strict=True):
            start_s = time.perf_counter()
            side()
            if round_:
                taken.append((time.perf_counter() - start_s) * 1e3)
    return [statistics.median(taken) for taken in times]


@torch.inference_mode()
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--chosen", type=int, default=8)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        block = make_block(args.experts, args.chosen, dtype)
        operators = CpuOperators(dtype, 64, 16, args.threads)
        for tokens in BATCHES:
            x = torch.randn(tokens, HIDDEN).to(dtype)
            theirs_ms, ours_ms = medians_ms(
                [lambda: block(x[None]), lambda: ours(block, args.chosen, operators, x)]  # noqa: B023
            )
            name = str(dtype).removeprefix("torch.")
            results.append({"dtype": name, "tokens": tokens, "transformers_ms": theirs_ms})
            results[-1] |= {"ours_ms": ours_ms, "ratio": theirs_ms / ours_ms}
            if not args.json:
                print(
                    f"{name:9} {tokens:4} tokens  transformers {theirs_ms:8.2f} ms  "
                    f"ours {ours_ms:8.2f} ms  {theirs_ms / ours_ms:.2f} x"
                )
    if args.json:
        json.dump(results, sys.stdout, indent=2)
    return 0


if __name__ == "__main__":
    sys.exit(main())
