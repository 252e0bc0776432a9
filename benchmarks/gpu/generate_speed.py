"""Output tokens/s of a batch of prompts, beside transformers' own generate on the same shape."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

from .bench import Bench
from .models import BLOCK_SIZE, config_of, random_runner, spec_of
from .serving import random_prompts, scheduler_of, serve

_MODEL = "Qwen3-1.7B"


def run(bench: Bench) -> None:
    batch, prompt, output = (2, 6, 3) if bench.dry else (32, 128, 128)
    config = config_of(_MODEL, tiny=bench.dry)
    prompts = random_prompts(batch, prompt, config["vocab_size"])
    mine = _phasewise(bench, config, prompts, output)
    bench.add(f"phasewise, {batch} x ({prompt} in, {output} out)", mine, "tokens/s")
    model = _transformers(bench, config)
    ids = torch.tensor(prompts, device=bench.device)
    # The static cache compiles by itself; the first call pays for it.
    for name, options in (
        ("dynamic cache", {}),
        ("static cache, compiled", {"cache_implementation": "static"}),
    ):
        if bench.dry and options:
            bench.skip(f"transformers, {name}", "compiles for a device")
            continue
        theirs = _rate(lambda o=options: _generate(model, ids, output, o), batch * output)
        bench.add(f"transformers, {name}", theirs, "tokens/s", ratio=mine / theirs)


def _rate(call: Callable[[], Any], tokens: int) -> float:
    """Tokens a second of the second call; the first one compiles."""
    call()
    begin = time.perf_counter()
    call()
    return tokens / (time.perf_counter() - begin)


def _phasewise(
    bench: Bench, config: dict[str, Any], prompts: list[list[int]], output: int
) -> float:
    with tempfile.TemporaryDirectory() as folder:
        spec = spec_of(config, Path(folder))
    length = len(prompts[0]) + output + BLOCK_SIZE
    num_blocks = len(prompts) * -(-length // BLOCK_SIZE)
    runner = random_runner(spec, bench.device, num_blocks=num_blocks, max_model_len=length)
    if bench.dry:
        runner.keep_decode_on_device(len(prompts))
    else:
        runner.warm_up(len(prompts))
    scheduler = scheduler_of(runner, max_batch_size=len(prompts), max_batch_tokens=8192)
    return _rate(lambda: serve(scheduler, runner, prompts, output), len(prompts) * output)


def _transformers(bench: Bench, config: dict[str, Any]) -> Any:
    kind = transformers.AutoConfig.for_model(**config)
    with torch.device(bench.device):
        model = transformers.AutoModelForCausalLM.from_config(kind, dtype=bench.dtype)
    return model.eval()


def _generate(model: Any, ids: torch.Tensor, output: int, options: dict[str, Any]) -> Any:
    made = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=output,
        min_new_tokens=output,
        do_sample=False,
        **options,
    )
    if ids.device.type == "cuda":
        torch.cuda.synchronize()
    assert made.shape[1] == ids.shape[1] + output
    return made
