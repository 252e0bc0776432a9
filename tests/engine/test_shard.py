"""Law 1 over every split: the tokens of several ranks are those of one, and of transformers.

All-reduce adds in another order than one matrix product, so logits differ by float32 rounding; a
mismatch of tokens is excused only where the reference's two best logits lie closer than `TIE`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from phasewise.engine import rank as rank_module
from phasewise.tests.engine.ranks_in_threads import ranks
from phasewise.tests.engine.test_exactness import (
    Case,
    Recorder,
    _assert_same,
    _run,
    _runner,
    _scattered,
)

SLOW = pytest.mark.slow  # not for its own length, but for all models' together
SPLITS = [
    (1, 2),
    (2, 2),
    (4, 1),
    pytest.param(2, 1, marks=SLOW),
    pytest.param(4, 2, marks=SLOW),
]
SIZES: dict[str, Any] = {"num_attention_heads": 8, "intermediate_size": 75}
MODELS: dict[str, dict[str, Any]] = {
    "llama": SIZES,  # 2 KV heads: with 4 ranks each is held twice
    "llama-biases-tied": SIZES | {"num_key_value_heads": 8},
    "llama-dynamic": SIZES,
    "mistral-window": SIZES,
    "mixtral": SIZES | {"intermediate_size": 76},  # transformers wants a multiple of 4
    "qwen3-moe-renormalised-dense-between": SIZES,
    "qwen2": SIZES | {"num_key_value_heads": 4},
    "qwen3-window": SIZES | {"num_key_value_heads": 1},
    "opt": {"num_attention_heads": 4},
    "opt-350m-order": {"num_attention_heads": 4},
    "opt-bare": {"num_attention_heads": 4},
}


@pytest.fixture(scope="module", params=sorted(MODELS))
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    directory = tmp_path_factory.mktemp(request.param)
    return Case(request.param, directory, **MODELS[request.param])


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of a few tokens are cut into parts too, so that short prompts show it."""
    monkeypatch.setattr(rank_module, "PART_TOKENS", 23)


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize(("tensor", "pipeline"), SPLITS)
def test_every_split_gives_the_reference_tokens(case: Case, tensor: int, pipeline: int) -> None:
    options = {"num_blocks": 64, "max_model_len": 300, "sampler": Recorder()}
    with ranks(case.directory, tensor, pipeline, **options) as (runner, _):
        sequences = _scattered(case.prompts, runner, seed=tensor)
        _run(runner, sequences, chunk=40)
    for prompt, sequence in zip(case.prompts, sequences, strict=True):
        assert sequence.tokens is not None
        _assert_same(case, prompt, sequence.tokens[len(prompt) :], case.generate(prompt))


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize(("tensor", "pipeline"), [(2, 2), pytest.param(4, 1, marks=SLOW)])
def test_ranks_together_hold_the_kv_of_one(case: Case, tensor: int, pipeline: int) -> None:
    whole = _runner(case.directory)
    prompt = case.prompts[-1]
    (alone,) = _scattered([prompt], whole, seed=1)
    _run(whole, [alone], chunk=64, count=1)
    options = {"num_blocks": 64, "max_model_len": 300, "sampler": Recorder()}
    with ranks(case.directory, tensor, pipeline, **options) as (runner, followers):
        (split,) = _scattered([prompt], runner, seed=1)
        _run(runner, [split], chunk=64, count=1)
        parts = [runner.rank, *(followers[rank].rank for rank in sorted(followers))]
        full = np.array(split.blocks[: len(prompt) // 16])
        for part in parts:
            layers, heads = part.shard.layers, part.shard.kv_heads
            expected = whole.cache.pool[layers.start : layers.stop, full]
            expected = expected[:, :, :, heads.start : heads.stop]
            assert torch.allclose(part.cache.pool[:, full], expected, rtol=1e-3, atol=1e-3)
