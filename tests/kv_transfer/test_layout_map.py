"""Any split to any split: the copies do what gathering all KV and scattering it again would."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from phasewise.engine.layout import KVLayout
from phasewise.engine.shard_plan import plan_shards
from phasewise.engine.spec import ModelSpec, load_spec
from phasewise.kv_transfer.events import PeerRefused
from phasewise.kv_transfer.layout_map import Part, Route, check_layouts, routes, windows
from phasewise.kv_transfer.window import spans

MODEL = Path(__file__).parents[2] / "models" / "tiny"
HEAD_DIM = 2
Side = tuple[int, int, int]  # tensor parallel, pipeline parallel, block size


@dataclasses.dataclass(frozen=True)
class Copy:
    """So many bytes, from an offset of one rank's pool to an offset of another's."""

    source_rank: int
    source_offset: int
    target_rank: int
    target_offset: int
    length: int


def copies(found: Sequence[Route], here: list[int], there: list[int], tokens: int) -> list[Copy]:
    """What the writers of all ranks do for a prompt."""
    made = []
    for route in found:
        source, target = windows(route)
        count = -(-tokens // source.step)
        units = source.units(here)[:count], target.units(there)[:count]
        for layer in range(len(route.layers)):
            start, goal = source.layer_offset(layer), target.layer_offset(layer)
            ranks = route.source.rank, route.target.rank
            for one, other, length in spans(source, target, *units).tolist():
                made.append(Copy(ranks[0], start + one, ranks[1], goal + other, length))
    return made


def _spec(num_layers: int, num_heads: int, num_kv_heads: int) -> ModelSpec:
    base = load_spec(MODEL)
    sizes = {"num_layers": num_layers, "num_heads": num_heads, "num_kv_heads": num_kv_heads}
    return dataclasses.replace(base, **sizes)


def _parts(spec: ModelSpec, side: Side, num_blocks: int) -> list[Part]:
    tensor, pipeline, block_size = side
    return [
        Part(
            rank=shard.rank,
            layers=shard.layers,
            kv_heads=shard.kv_heads,
            layout=KVLayout(
                num_layers=len(shard.layers),
                num_blocks=num_blocks,
                num_kv_heads=len(shard.kv_heads),
                block_size=block_size,
                head_dim=HEAD_DIM,
                dtype="float32",
                fingerprint="x",
            ),
        )
        for shard in plan_shards(spec, tensor_parallel=tensor, pipeline_parallel=pipeline)
    ]


def _scatter(parts: list[Part], kv: np.ndarray, blocks: list[int]) -> list[np.ndarray]:
    """Pools that hold `kv` [layers, 2, heads, tokens, dim] in these blocks and noise elsewhere."""
    noise = np.random.default_rng(len(blocks))
    pools = []
    for part in parts:
        pool = noise.random(part.layout.shape, dtype=np.float32) + 2.0
        own = kv[part.layers.start : part.layers.stop, :, part.kv_heads.start : part.kv_heads.stop]
        for token in range(kv.shape[3]):
            block, at = divmod(token, part.layout.block_size)
            pool[:, blocks[block], :, :, at] = own[:, :, :, token]
        pools.append(pool)
    return pools


@st.composite
def splits(draw: st.DrawFn) -> tuple[ModelSpec, Side, Side]:
    kv_heads = draw(st.sampled_from([1, 2, 4, 8]))
    num_layers = draw(st.integers(1, 5))
    sizes = draw(st.sampled_from([(2, 2), (4, 4), (2, 4), (4, 2), (1, 4), (6, 2)]))
    sides = [
        (draw(st.sampled_from([1, 2, 4, 8])), draw(st.integers(1, min(3, num_layers))), size)
        for size in sizes
    ]
    return _spec(num_layers, 8, kv_heads), sides[0], sides[1]


@settings(max_examples=150, deadline=None)
@given(split=splits(), num_tokens=st.integers(1, 19), seed=st.integers(0, 1000))
def test_copies_equal_gather_then_scatter(
    split: tuple[ModelSpec, Side, Side], num_tokens: int, seed: int
) -> None:
    spec, source_side, target_side = split
    draw = np.random.default_rng(seed)
    kv = draw.random((spec.num_layers, 2, spec.num_kv_heads, num_tokens, HEAD_DIM), np.float32)
    num_blocks = 24
    tables = [
        draw.permutation(num_blocks)[: -(-num_tokens // side[2])].tolist()
        for side in (source_side, target_side)
    ]
    sources, targets = (_parts(spec, side, num_blocks) for side in (source_side, target_side))
    pools = _scatter(sources, kv, tables[0])
    before = [np.zeros(part.layout.shape, np.float32) for part in targets]
    flat = [pool.view(np.uint8).reshape(-1) for pool in pools]
    into = [pool.view(np.uint8).reshape(-1) for pool in before]
    written = [np.zeros(len(pool), np.uint8) for pool in into]
    for copy in copies(routes(sources, targets), *tables, num_tokens):
        here = slice(copy.source_offset, copy.source_offset + copy.length)
        there = slice(copy.target_offset, copy.target_offset + copy.length)
        into[copy.target_rank][there] = flat[copy.source_rank][here]
        written[copy.target_rank][there] += 1
    for part, pool, count in zip(targets, before, written, strict=True):
        own = kv[part.layers.start : part.layers.stop, :, part.kv_heads.start : part.kv_heads.stop]
        assert count.max() == 1, "no byte is written twice"
        size = part.layout.block_size
        for token in range(num_tokens):
            block, at = divmod(token, size)
            assert (pool[:, tables[1][block], :, :, at] == own[:, :, :, token]).all()
        others = [block for block in range(num_blocks) if block not in tables[1]]
        assert not pool[:, others].any(), "other blocks are left alone"


def test_equal_splits_copy_each_run_of_neighbours_once_a_layer() -> None:
    spec = _spec(3, 8, 4)
    parts = _parts(spec, (2, 1, 4), 16)
    found = copies(routes(parts, parts), [3, 4, 5, 9], [7, 8, 9, 2], 16)
    assert len(found) == 2 * 3 * 2  # ranks, layers, runs
    assert {(copy.source_rank, copy.target_rank) for copy in found} == {(0, 0), (1, 1)}


def test_replicated_heads_are_sent_by_different_ranks_in_turn() -> None:
    spec = _spec(2, 8, 2)
    sources, targets = _parts(spec, (4, 1, 4), 8), _parts(spec, (4, 1, 4), 8)
    found = {(route.source.rank, route.target.rank) for route in routes(sources, targets)}
    assert found == {(0, 0), (1, 1), (2, 2), (3, 3)}


@pytest.mark.parametrize(
    ("field", "value", "named"),
    [
        ("block_size", 6, "neither divides the other"),
        ("head_dim", 64, "head_dim is 2"),
        ("dtype", "bfloat16", "dtype is 'float32'"),
        ("fingerprint", "y", "fingerprint is 'x'"),
    ],
)
def test_what_cannot_work_is_refused_by_name(field: str, value: object, named: str) -> None:
    (part,) = _parts(_spec(1, 8, 2), (1, 1, 4), 8)
    other = dataclasses.replace(part.layout, **{field: value})  # pyright: ignore
    with pytest.raises(PeerRefused, match=named):
        check_layouts(part.layout, other)


def test_kv_that_no_rank_holds_is_refused() -> None:
    sources = _parts(_spec(2, 8, 2), (1, 1, 4), 8)
    targets = _parts(_spec(3, 8, 2), (1, 1, 4), 8)
    with pytest.raises(PeerRefused, match="layers 2 to 2"):
        routes(sources, targets)
