"""What an FP8 cache saves and what it costs, against the model's own dtype, in one run.

    python benchmarks/fp8_cache.py [--model models/tiny] [--threads 1] [--rounds 9] [--json]

By dtype: bytes of KV a token; bytes that a prompt of 1,024 tokens sends; the time of a decode step
of 16 rows at 1,500 tokens each, both caches in turn, median of the rounds; perplexity on text that
`models/tiny` was not trained on, and how often the likeliest token is the same. Perplexity is of
windows of 512 tokens, each in chunks of 128, whose queries read all keys and values from the cache.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from phasewise.engine.batch import Batch
from phasewise.engine.columns import columns_of
from phasewise.engine.layout import FP8
from phasewise.engine.request import Request, SamplingParams
from phasewise.engine.runner import Runner, build_runner
from phasewise.engine.sequence import Sequence
from phasewise.models.stdlib_corpus import read_corpus
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from tokenizers import Tokenizer

ROWS, CONTEXT = 16, 1500
PROMPT = 1024
WINDOW, CHUNK = 512, 128
Report = dict[str, dict[str, Any]]


def sequence_of(tokens: list[int], blocks: range) -> Sequence:
    sampling = SamplingParams(max_tokens=1, temperature=0.0)
    request = Request(
        id=str(blocks.start),
        token_ids=tuple(tokens),
        num_prompt_tokens=len(tokens),
        sampling=sampling,
    )
    sequence = Sequence(request)
    sequence.blocks = list(blocks)
    return sequence


def decode_batch(runner: Runner, tokens: list[int]) -> Batch:
    """Rows at their last position, whose contexts are in the pool."""
    width = runner.layout.blocks_for(CONTEXT)
    rows = [
        sequence_of(tokens[row * 64 :][:CONTEXT], range(row * width, (row + 1) * width))
        for row in range(ROWS)
    ]
    for row in rows:
        runner.run(Batch(sequences=[row], starts=[0], counts=[CONTEXT]))
    return Batch(sequences=rows, starts=[CONTEXT - 1] * ROWS, counts=[1] * ROWS)


def step_times(runners: dict[str, Runner], tokens: list[int], rounds: int) -> dict[str, float]:
    """Median seconds of a decode step, the runners in turn."""
    batches = {name: decode_batch(runner, tokens) for name, runner in runners.items()}
    taken: dict[str, list[float]] = {name: [] for name in runners}
    for _ in range(rounds + 1):
        for name, runner in runners.items():
            started_s = time.perf_counter()
            runner.run(batches[name])
            taken[name].append(time.perf_counter() - started_s)
    return {name: statistics.median(times[1:]) for name, times in taken.items()}


def window_logits(runner: Runner, tokens: list[int]) -> torch.Tensor:  # float32 [tokens, vocab]
    sequence = sequence_of(tokens, range(runner.layout.blocks_for(len(tokens))))
    logits = []
    for start in range(0, len(tokens), CHUNK):
        count = min(CHUNK, len(tokens) - start)
        batch = Batch(sequences=[sequence], starts=[start], counts=[count])
        columns = columns_of(batch, [0], runner.layout.block_size)
        columns = dataclasses.replace(columns, wanted=np.arange(count))
        part = runner.rank.compute(columns)
        assert part is not None
        logits.append(part.clone())
    return torch.cat(logits)


def accuracy(
    runners: dict[str, Runner], windows: list[list[int]], advance: Any
) -> Iterator[dict[str, float]]:
    """A window at a time: log likelihood by cache, agreement, squared error and variance."""
    for tokens in windows:
        target = torch.tensor(tokens[1:])[:, None]
        logits = {name: window_logits(runner, tokens)[:-1] for name, runner in runners.items()}
        found = {
            name: -float(rows.log_softmax(-1).gather(1, target).sum())
            for name, rows in logits.items()
        }
        plain, fp8 = logits["auto"], logits[FP8]
        found["agreed"] = float((plain.argmax(-1) == fp8.argmax(-1)).sum())
        found["error"] = float((plain - fp8).pow(2).mean())
        found["variance"] = float((plain - plain.mean(-1, keepdim=True)).pow(2).mean())
        advance()
        yield found


def measure(model: Path, dtype: str, tokens: list[int], options: argparse.Namespace) -> Report:
    """By cache."""
    runners = {
        name: build_runner(
            model,
            dtype=dtype,
            kv_dtype=name,
            num_blocks=ROWS * (CONTEXT // 16 + 1),
            max_model_len=2048,
            threads=options.threads,
        )
        for name in ("auto", FP8)
    }
    steps = step_times(runners, tokens, options.rounds)
    count = min(options.windows, len(tokens) // WINDOW)
    windows = [tokens[at * WINDOW : (at + 1) * WINDOW] for at in range(count)]
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task(dtype, total=count)
        found = list(accuracy(runners, windows, lambda: progress.advance(task)))
    total = {name: sum(one[name] for one in found) for name in found[0]}
    predicted = count * (WINDOW - 1)
    report: Report = {}
    for name, runner in runners.items():
        layout = runner.layout
        block = layout.num_layers * layout.block_bytes
        report[layout.dtype] = {
            "bytes_a_token": block / layout.block_size,
            "prompt_bytes": layout.blocks_for(PROMPT) * block,
            "decode_step_ms": round(1000 * steps[name], 3),
            "perplexity": round(math.exp(total[name] / predicted), 4),
        }
    report["ratios"] = {
        "bytes": round(report[dtype]["bytes_a_token"] / report[FP8]["bytes_a_token"], 3),
        "decode_step": round(steps["auto"] / steps[FP8], 3),
        "agreement": round(total["agreed"] / predicted, 4),
        "logits_rms_error": round(math.sqrt(total["error"] / total["variance"]), 4),
    }
    return report


def show(report: dict[str, Report]) -> None:
    table = Table(title="FP8 cache against the model's own dtype")
    names = ("model, cache", "KV a token", f"{PROMPT} tokens sent", "decode step", "perplexity")
    for name in (*names, "same likeliest token", "logits RMS error"):
        table.add_column(name, justify="left" if name == names[0] else "right")
    for dtype, caches in report.items():
        ratios = caches["ratios"]
        for cache in (dtype, FP8):
            row, is_fp8 = caches[cache], cache == FP8
            table.add_row(
                f"{dtype}, {cache}",
                f"{row['bytes_a_token']:.0f} B" + f" ({ratios['bytes']} x less)" * is_fp8,
                f"{row['prompt_bytes'] / 1024:.0f} KiB",
                f"{row['decode_step_ms']:.2f} ms" + f" ({ratios['decode_step']} x)" * is_fp8,
                f"{row['perplexity']:.3f}",
                f"{ratios['agreement']:.2%}" * is_fp8,
                f"{ratios['logits_rms_error']:.2%}" * is_fp8,
            )
    Console().print(table)


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("--model", type=Path, default=Path("models/tiny"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--windows", type=int, default=24, help="of 512 held-out tokens")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    tokenizer = Tokenizer.from_file(str(options.model / "tokenizer.json"))
    tokens = [
        token for one in tokenizer.encode_batch(list(read_corpus().held_out)) for token in one.ids
    ]
    report = {
        dtype: measure(options.model, dtype, tokens, options) for dtype in ("float32", "bfloat16")
    }
    print(json.dumps(report, indent=1)) if options.json else show(report)


if __name__ == "__main__":
    main()
