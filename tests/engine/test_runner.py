"""What a runner promises beside exact tokens: columns back, memory it was given, refusals."""

from __future__ import annotations

import mmap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from phasewise.engine.batch import Batch
from phasewise.engine.cache import KVCache
from phasewise.engine.errors import InvalidConfig
from phasewise.engine.layout import KVLayout
from phasewise.engine.request import Request, SamplingParams
from phasewise.engine.runner import build_runner
from phasewise.engine.sequence import Sequence

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("llama")
    config = transformers.LlamaConfig(
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=51,
        initializer_range=0.3,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(directory)
    return directory


def _sequence(length: int, blocks: list[int], **sampling: Any) -> Sequence:
    params = SamplingParams(**({"max_tokens": 4, "temperature": 0.0} | sampling))
    tokens = tuple(range(1, length + 1))
    request = Request(id="a", token_ids=tokens, num_prompt_tokens=length, sampling=params)
    sequence = Sequence(request)
    sequence.blocks = blocks
    return sequence


def test_rows_that_do_not_reach_their_end_give_minus_one(checkpoint: Path) -> None:
    runner = build_runner(checkpoint, num_blocks=8, max_model_len=64, threads=1)
    part, whole = _sequence(20, [0, 1]), _sequence(9, [5])
    output = runner.run(Batch(sequences=[part, whole], starts=[0, 0], counts=[12, 9]))
    assert output.token_ids[0] == -1
    assert 0 <= output.token_ids[1] < 51
    assert output.logprobs is None
    only_part = runner.run(Batch(sequences=[part], starts=[0], counts=[12]))
    assert only_part.token_ids == [-1]


def test_logprobs_stand_beside_the_rows_that_asked(checkpoint: Path) -> None:
    runner = build_runner(checkpoint, num_blocks=8, max_model_len=64, threads=1)
    silent, asking, part = (
        _sequence(9, [5]),
        _sequence(9, [2], logprobs=2),
        _sequence(20, [0, 1], logprobs=2),
    )
    batch = Batch(sequences=[silent, asking, part], starts=[0, 0, 0], counts=[9, 9, 12])
    output = runner.run(batch)
    assert output.logprobs is not None
    assert [entry is None for entry in output.logprobs] == [True, False, True]


def test_kv_goes_into_the_memory_that_was_supplied(checkpoint: Path) -> None:
    maps: list[mmap.mmap] = []

    def allocate(num_bytes: int) -> mmap.mmap:
        maps.append(mmap.mmap(-1, num_bytes))
        return maps[0]

    runner = build_runner(checkpoint, num_blocks=4, max_model_len=64, threads=1, allocate=allocate)
    runner.run(Batch(sequences=[_sequence(16, [3])], starts=[0], counts=[16]))
    layout = runner.layout
    raw = np.frombuffer(maps[0], dtype=np.uint8)
    for layer in range(layout.num_layers):
        start = layout.offset(layer, 3)
        assert raw[start : start + layout.block_bytes].any()
        assert not raw[layout.offset(layer, 0) : start].any()


def test_the_pool_takes_the_memory_it_is_given_or_refuses(checkpoint: Path) -> None:
    runner = build_runner(checkpoint, memory_bytes=100_000, max_model_len=64, threads=1)
    assert runner.layout.num_bytes <= 100_000 < runner.layout.num_bytes + 2 * 8192
    with pytest.raises(InvalidConfig, match=r"kv\.memory"):
        build_runner(checkpoint, memory_bytes=10_000, max_model_len=64, threads=1)


def test_an_unknown_dtype_is_refused(checkpoint: Path) -> None:
    with pytest.raises(InvalidConfig, match=r"model\.dtype"):
        build_runner(checkpoint, dtype="int8", num_blocks=4, threads=1)


def test_warm_up_runs_in_a_pool_of_one_block(checkpoint: Path) -> None:
    runner = build_runner(checkpoint, num_blocks=1, max_model_len=16, threads=1)
    runner.warm_up()
    assert bool(torch.isfinite(runner.cache.pool).all())


def test_the_cache_views_its_buffer_in_the_layouts_shape() -> None:
    layout = KVLayout(
        num_layers=2, num_blocks=3, num_kv_heads=2, block_size=4, head_dim=6, dtype="bfloat16"
    )
    buffer = bytearray(layout.num_bytes + 64)
    cache = KVCache(layout, buffer)
    cache.layers[1][2, 1, 1, 3, 5] = 1.0
    end = layout.num_bytes
    assert bytes(buffer[end - 2 : end]) == b"\x80\x3f"  # bfloat16 1.0, the pool's last item
    assert cache.pool.shape == layout.shape
