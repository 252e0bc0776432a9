"""ShareGPT lengths as DistServe prepares them, from public single-turn lengths.

DistServe (LLMServe/DistServe, evaluation/2-benchmark-serving, 0-prepare-dataset.py) takes the
conversations of ShareGPT's split file, whose pieces end within 2,048 tokens, with three turns or
more; joins the first k turns, k uniform, into a prompt; takes the next turn, a person's or the
model's, as the answer; and keeps what is shorter than 2,048 tokens in all. It published means of
755.5 and 200.3 tokens (OSDI '24, figure 7), not the lengths.

Here turns are drawn from NanoFlow's table of single-turn ShareGPT lengths; the number of rounds is
geometric, and its mean is the one thing fitted, to the published mean prompt. Answers come out
longer than published (a first turn is longer than later ones) and are scaled to that mean.

    python benchmarks/sharegpt_lengths.py [-o configs/lengths/sharegpt-distserve.csv.gz]
"""

from __future__ import annotations

import argparse
import gzip
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from phasewise.placement.workload.traces import Trace, read_trace

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "tests" / "placement" / "data" / "nanoflow_sharegpt.csv.gz"
TARGET = ROOT / "configs" / "lengths" / "sharegpt-distserve.csv.gz"
MEANS = 755.5, 200.3  # tokens, published
LONGEST = 2048
REQUESTS = 6000
MOST_ROUNDS = 64.0


def conversations(single: Trace, mean_rounds: float, seed: int = 0) -> NDArray[np.int64]:
    """[requests, 2] prompt and answer lengths."""
    rng = np.random.default_rng(seed)
    found: list[tuple[int, int]] = []
    while len(found) < REQUESTS:
        rounds = 1 + int(rng.geometric(1 / (mean_rounds - 1)))
        rows = rng.integers(len(single.prompt_tokens), size=rounds)
        turns = np.stack([single.prompt_tokens[rows], single.output_tokens[rows]], axis=1).ravel()
        turns = turns[np.cumsum(turns) <= LONGEST]
        if len(turns) < 3:
            continue
        before = int(rng.integers(1, len(turns)))
        prompt, answer = int(turns[:before].sum()), int(turns[before])
        if prompt + answer < LONGEST and (prompt >= 4 or answer >= 4):
            found.append((prompt, answer))
    return np.array(found)


def fitted(single: Trace) -> tuple[NDArray[np.int64], float]:
    """With the published mean prompt, by bisection over the rounds; answers then scaled."""
    low, high = 2.1, MOST_ROUNDS
    for _ in range(12):
        rounds = (low + high) / 2
        mean = float(conversations(single, rounds)[:, 0].mean())
        low, high = (rounds, high) if mean < MEANS[0] else (low, rounds)
    lengths = conversations(single, high)
    scale = MEANS[1] / float(lengths[:, 1].mean())
    lengths[:, 1] = np.maximum(1, np.rint(lengths[:, 1] * scale))
    return lengths, high


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("-o", "--output", type=Path, default=TARGET)
    arguments = parser.parse_args()
    lengths, rounds = fitted(read_trace(SOURCE))
    lines = ["TIMESTAMP,ContextTokens,GeneratedTokens", *(f"XXX,{p},{o}" for p, o in lengths)]
    data = ("\n".join(lines) + "\n").encode()
    arguments.output.write_bytes(gzip.compress(data, mtime=0))
    for name, column in zip(("prompt", "answer"), lengths.T, strict=True):
        middle, spread = np.median(column), np.log(column).std()
        print(f"{name}: mean {column.mean():.1f}, median {middle:.0f}, sigma {spread:.2f}")
    print(f"{rounds:.1f} rounds on the mean; {arguments.output}")


if __name__ == "__main__":
    main()
