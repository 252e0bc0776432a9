"""FP8 blocks between workers that are split otherwise: values arrive with their own scales."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from phasewise.engine.cache import KVCache, plain_buffer
from phasewise.engine.layout import FP8
from phasewise.engine.shard_plan import plan_shards
from phasewise.kernels import fp8
from phasewise.kv_transfer.layout_map import Part, routes
from phasewise.tests.kv_transfer.test_layout_map import _spec, copies
from torch import Tensor

TOKENS, NUM_BLOCKS, HEAD_DIM = 19, 12, 10
Side = tuple[int, int, int]  # tensor parallel, pipeline parallel, block size


def parts_of(side: Side) -> list[Part]:
    tensor, pipeline, block_size = side
    spec = dataclasses.replace(_spec(3, 8, 4), head_dim=HEAD_DIM)
    return [
        Part(
            rank=shard.rank,
            layers=shard.layers,
            kv_heads=shard.kv_heads,
            layout=shard.kv_layout(
                spec, FP8, block_size=block_size, num_blocks=NUM_BLOCKS, fingerprint="x"
            ),
        )
        for shard in plan_shards(spec, tensor_parallel=tensor, pipeline_parallel=pipeline)
    ]


def slots_of(part: Part, blocks: list[int]) -> Tensor:
    size = part.layout.block_size
    return torch.tensor([blocks[t // size] * size + t % size for t in range(TOKENS)])


@pytest.mark.parametrize(
    ("source_side", "target_side"),
    [
        ((2, 1, 16), (1, 1, 16)),
        ((1, 1, 4), (4, 1, 4)),
        ((2, 1, 4), (1, 3, 8)),
        ((1, 2, 6), (2, 1, 2)),
    ],
)
def test_every_split_reads_the_values_that_were_written(
    source_side: Side, target_side: Side
) -> None:
    torch.manual_seed(0)
    kv = torch.randn(3, 2, TOKENS, 4, HEAD_DIM) * 10 ** torch.randn(3, 2, TOKENS, 4, 1)
    sources, targets = parts_of(source_side), parts_of(target_side)
    tables = [
        torch.randperm(NUM_BLOCKS)[: -(-TOKENS // side[2])].tolist()
        for side in (source_side, target_side)
    ]
    pools = [
        [plain_buffer(part.layout.num_bytes).zero_() for part in side]
        for side in (sources, targets)
    ]
    for part, pool in zip(sources, pools[0], strict=True):
        for index, layer in enumerate(KVCache(part.layout, pool).layers):
            own = kv[part.layers.start + index][:, :, part.kv_heads.start : part.kv_heads.stop]
            fp8.append(layer, *own, slots_of(part, tables[0]))
    for copy in copies(routes(sources, targets), *tables, TOKENS):
        moved = pools[0][copy.source_rank][copy.source_offset :][: copy.length]
        pools[1][copy.target_rank][copy.target_offset :][: copy.length] = moved
    for part, pool in zip(targets, pools[1], strict=True):
        for index, layer in enumerate(KVCache(part.layout, pool).layers):
            own = kv[part.layers.start + index][:, :, part.kv_heads.start : part.kv_heads.stop]
            read = fp8.gather(layer, torch.tensor(tables[1]))  # [blocks, 2, heads, size, dim]
            read = read.permute(1, 0, 3, 2, 4).flatten(1, 2)[:, :TOKENS]
            assert torch.equal(read, fp8.dequantise(*fp8.quantise(own)))
