"""Whole models on the device against transformers on the same device, from one checkpoint."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from phasewise.engine.checkpoint import Checkpoint
from phasewise.engine.runner import Runner, build_runner
from phasewise.engine.spec import load_spec

from .bench import Bench
from .models import runner_of
from .serving import random_prompts, scheduler_of, serve

TIE = 1e-3  # of two logits, which float32 sums in another order may tell apart
_SIZES: dict[str, Any] = {
    "vocab_size": 4096,
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 1024,
    "initializer_range": 0.1,
    "eos_token_id": None,
    "bos_token_id": None,
    "pad_token_id": None,
}
_TINY = {
    "vocab_size": 131,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "head_dim": 16,
    "initializer_range": 0.3,
}
_FAMILIES: dict[str, dict[str, Any]] = {"Llama": {}, "Qwen3": {}, "Mistral": {"sliding_window": 48}}


def run(bench: Bench) -> None:
    families = {"Qwen3": {}} if bench.dry else _FAMILIES
    for family, changes in families.items():
        with tempfile.TemporaryDirectory() as folder:
            model = _write(family, changes | (_TINY if bench.dry else {}), Path(folder))
            _tokens(bench, family, model.to(bench.device), Path(folder))
            if not bench.dry:
                _bfloat16(bench, family, model, Path(folder))


def _write(family: str, changes: dict[str, Any], folder: Path) -> Any:
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**(_SIZES | changes))
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    model.save_pretrained(folder)
    return model


def _runner(bench: Bench, folder: Path, dtype: str, max_rows: int) -> Runner:
    """On the GPU's operators, with decode steps captured where there is a GPU."""
    if bench.dry:
        tensors = Checkpoint(folder, torch.float32, bench.device)
        runner = runner_of(
            load_spec(folder), tensors, bench.device, num_blocks=256, max_model_len=512
        )
        runner.keep_decode_on_device(max_rows)
        return runner
    runner = build_runner(
        folder, device="cuda", threads=1, dtype=dtype, num_blocks=256, max_model_len=512
    )
    runner.warm_up(max_rows)
    return runner


def _tokens(bench: Bench, family: str, model: Any, folder: Path) -> None:
    """Greedy float32 tokens of prompts that are computed together, in chunks, and decoded."""
    count, lengths = (3, (1, 9, 20)) if bench.dry else (24, (1, 15, 16, 17, 130, 300))
    vocab_size = model.config.vocab_size
    prompts = [random_prompts(1, n, vocab_size, seed=n)[0] for n in lengths]
    runner = _runner(bench, folder, "float32", max_rows=8)
    scheduler = scheduler_of(runner, max_batch_size=5, max_batch_tokens=64)
    mine = serve(scheduler, runner, prompts, count)
    exact, excused = True, 0
    for prompt, tokens in zip(prompts, mine, strict=True):
        theirs, margins = _generate(model, prompt, count)
        for mine_one, their_one, margin in zip(tokens, theirs, margins, strict=True):
            if mine_one != their_one:
                exact, excused = exact and margin < TIE, excused + (margin < TIE)
                break
    bench.check(f"{family}, float32: tokens of generate", exact, streams=len(prompts), ties=excused)


def _generate(model: Any, prompt: list[int], count: int) -> tuple[list[int], list[float]]:
    """Tokens, and how far the two largest logits were apart at each."""
    ids = torch.tensor([prompt], device=model.device)
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=count,
        do_sample=False,
        eos_token_id=None,
        output_logits=True,
        return_dict_in_generate=True,
    )
    top = torch.cat(out.logits).float().topk(2).values
    return out.sequences[0, len(prompt) :].tolist(), (top[:, 0] - top[:, 1]).tolist()


class _Recorder:
    """Chooses greedily and keeps the logits it saw."""

    def __init__(self) -> None:
        self.logits: list[torch.Tensor] = []

    def sample(
        self, logits: torch.Tensor, sequences: list[Any], positions: list[int]
    ) -> tuple[list[int], None]:
        self.logits.append(logits.clone())
        return logits.argmax(-1).tolist(), None


def _bfloat16(bench: Bench, family: str, model: Any, folder: Path) -> None:
    """How far bfloat16 logits are from float32's, beside transformers' own in bfloat16."""
    (prompt,) = random_prompts(1, 200, model.config.vocab_size)
    runner = _runner(bench, folder, "bfloat16", max_rows=1)
    runner._sampler = recorder = _Recorder()
    runner.keep_decode_on_device(1)
    scheduler = scheduler_of(runner, max_batch_size=1, max_batch_tokens=64)
    (tokens,) = serve(scheduler, runner, [prompt], 16)
    ids = torch.tensor([prompt + tokens[:-1]], device=model.device)
    with torch.no_grad():
        exact = model(ids).logits[0, len(prompt) - 1 :].float()
        theirs = type(model).from_pretrained(folder, dtype=torch.bfloat16).to(model.device)(ids)
    rounding = (theirs.logits[0, len(prompt) - 1 :].float() - exact).square().mean().sqrt()
    mine = (torch.cat(recorder.logits) - exact).square().mean().sqrt()
    ratio = float(mine / rounding)
    bench.check(f"{family}, bfloat16: rounding beside transformers'", ratio < 1.5, ratio=ratio)
