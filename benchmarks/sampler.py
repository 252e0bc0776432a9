"""Time of one sampling step, greedy against sampled, by vocabulary.

    python benchmarks/sampler.py [--device cpu] [--batch 64] [--json]

Logits are drawn once: a normal bulk with a hundred tokens raised above it, whose nucleus of 0.9 is
small as a trained model's mostly is, and `flat`, a plain normal whose nucleus is about a quarter of
the vocabulary: the worst case for top-p. Each prompt has 1,024 tokens (penalties look at them). The
copy of the logits, which every step overwrites, is not in the time.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time

import torch
from phasewise.engine.request import Request, SamplingParams
from phasewise.engine.sampler import Sampler
from phasewise.engine.sequence import Sequence

VOCABULARIES = (2048, 32_000, 128_256)
CASES: dict[str, dict[str, float]] = {
    "greedy": {"temperature": 0.0},
    "temperature": {"temperature": 0.8},
    "top_k 50": {"temperature": 0.8, "top_k": 50},
    "top_p 0.9": {"temperature": 0.8, "top_p": 0.9},
    "top_p 0.9 flat": {"temperature": 1.0, "top_p": 0.9},
    "penalties, greedy": {"temperature": 0.0, "repetition_penalty": 1.1, "presence_penalty": 0.5},
}
PROMPT_LENGTH = 1024


def make_logits(batch: int, vocab: int, device: torch.device, *, flat: bool) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(batch, vocab, generator=generator) * 2
    if not flat:
        likely = torch.randint(vocab, (batch, 100), generator=generator)
        logits.scatter_add_(1, likely, torch.rand(batch, 100, generator=generator) * 12 + 6)
    return logits.to(device)


def make_sequences(batch: int, vocab: int, params: dict[str, float]) -> list[Sequence]:
    return [
        Sequence(
            Request(
                id=str(row),
                token_ids=tuple((row * 31 + 7 * i) % vocab for i in range(PROMPT_LENGTH)),
                num_prompt_tokens=PROMPT_LENGTH,
                sampling=SamplingParams(seed=row, **params),  # pyright: ignore[reportArgumentType]
            )
        )
        for row in range(batch)
    ]


def measure(batch: int, vocab: int, case: str, device: torch.device, budget_s: float) -> float:
    """Median microseconds of a step of `batch` rows, after two unmeasured ones."""
    logits = make_logits(batch, vocab, device, flat=case.endswith("flat"))
    sequences = make_sequences(batch, vocab, CASES[case])
    sampler, work = Sampler(vocab, frozenset({0})), torch.empty_like(logits)
    times: list[float] = []
    end = time.perf_counter() + budget_s
    while len(times) < 5 or (time.perf_counter() < end and len(times) < 200):
        work.copy_(logits)  # a step overwrites them
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        sampler.sample(work, sequences)
        times.append(time.perf_counter() - start)
    return statistics.median(times[2:]) * 1e6


def main() -> int:
    parser = argparse.ArgumentParser(description="Time of one sampling step.")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--budget-s", type=float, default=1.0, help="seconds for each figure")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    device = torch.device(args.device)
    table = {
        case: {
            vocab: measure(args.batch, vocab, case, device, args.budget_s) for vocab in VOCABULARIES
        }
        for case in CASES
    }
    if args.json:
        print(json.dumps({"batch": args.batch, "device": args.device, "us_per_step": table}))
        return 0
    print(f"us per step, batch {args.batch}, {device}, {torch.get_num_threads()} threads")
    print(f"{'':20}" + "".join(f"{vocab:>12,}" for vocab in VOCABULARIES))
    for case, row in table.items():
        print(f"{case:20}" + "".join(f"{us:12,.0f}" for us in row.values()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
