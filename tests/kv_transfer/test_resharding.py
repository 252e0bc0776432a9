"""KV between workers that are split differently: bytes compared over all ranks, every CPU
transport, push and pull, blocks of other sizes, and what the receiver holds already."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from phasewise.engine.spec import ModelSpec, load_spec
from phasewise.kv_transfer.events import Asked, Ended, Outcome, PeerRefused, Released
from phasewise.tests.kv_transfer.harness import bounded
from phasewise.tests.kv_transfer.sides import BOUND_S, Side, Split, sides

MODEL = Path(__file__).parents[2] / "models" / "tiny"
SPLITS = [(1, 1), (2, 1), (4, 1), (1, 2), (2, 2), (4, 2)]
SIZES = [(16, 16), (16, 32), (32, 16)]
TRANSPORTS = ["shm", "tcp", "gloo"]
CHECKED: dict[str, Any] = {"checksum": True, "small_bytes": 0, "answer_s": 10.0, "silence_s": 10.0}
PAIRS = list(itertools.product(SPLITS, SPLITS))


def spec_of(num_kv_heads: int, num_layers: int = 3) -> ModelSpec:
    base = load_spec(MODEL)
    heads = {"num_layers": num_layers, "num_heads": 8, "num_kv_heads": num_kv_heads, "head_dim": 6}
    return dataclasses.replace(base, **heads)


def covering() -> list[tuple[Any, ...]]:
    """Every two splits once, with transports, sizes, modes and head counts in turn, so that any
    two of these meet as well."""
    cases = []
    for number, (source, target) in enumerate(PAIRS):
        row, column = divmod(number, 6)
        transport = TRANSPORTS[(row + column) % 3]
        sizes = SIZES[(row + 2 * column + row // 3) % 3]
        cases.append(
            (
                source,
                target,
                transport,
                sizes,
                ("push", "pull")[number % 2],
                (2, 8)[(row + column // 3) % 2],
            )
        )
    return cases


def blocks_of(draw: np.random.Generator, num_tokens: int, size: int) -> list[int]:
    return draw.permutation(40)[: -(-num_tokens // size)].tolist()


async def committed(side: Side) -> Ended:
    ended = await side.next()
    assert isinstance(ended, Ended) and ended.outcome is Outcome.COMMITTED, ended
    return ended


async def push(
    prefill: Side,
    decode: Side,
    address: Any,
    blocks: tuple[list[int], list[int]],
    tokens: int,
    skip: int,
) -> None:
    """In two chunks, the second of which fills the first one's last block."""
    source, target = blocks
    lease, kv = prefill.kv.new_lease(), prefill.kv
    asking = asyncio.create_task(kv.ask(address, lease, len(source), b"", tokens))
    asked = await decode.next()
    assert isinstance(asked, Asked) and asked.num_blocks == len(target)
    assert decode.kv.answer(asked, target[skip:], skip)
    assert await asyncio.wait_for(asking, BOUND_S)
    size = prefill.split.block_size
    cuts = [(0, tokens // 2), (tokens // 2, tokens)]
    for step, (begin, end) in enumerate(cuts):
        clock, finishes = prefill.begin(step)
        first, last = begin // size, -(-end // size)
        missing = first - kv.skipped(lease)
        chunk = source[first:last]
        if missing + len(chunk) > 0:
            kv.push(lease, chunk[max(0, -missing) :], max(0, missing), clock)
        await prefill.compute(finishes)
    kv.commit(lease, tokens, 77)


async def move(
    spec: ModelSpec,
    source: Split,
    target: Split,
    *,
    config: dict[str, Any],
    mode: str,
    tokens: int,
    skip: int = 0,
) -> None:
    """One transfer, and all that must hold of it."""
    draw = np.random.default_rng(tokens)
    async with sides(spec, source, target, config) as (prefill, decode, here, there):
        row = sum(size for _, size in prefill.held[0].own.layout.sections)
        shape = (spec.num_layers, 2, spec.num_kv_heads, tokens, row)
        kv = draw.integers(0, 256, shape, dtype=np.uint8)
        blocks = tuple(blocks_of(draw, tokens, split.block_size) for split in (source, target))
        prefill.write(kv, blocks[0])
        held_here = blocks[1][:skip]
        decode.write(kv[:, :, :, : skip * target.block_size], held_here)
        granted = blocks[1][skip:]
        before = decode.others(granted)
        if mode == "push":
            await push(prefill, decode, there, blocks, tokens, skip)
        else:
            lease = prefill.kv.new_lease()
            prefill.kv.park(lease, blocks[0], tokens, 77)
            await asyncio.wait_for(decode.kv.grant(here, lease, granted, 77, skip), BOUND_S)
        ended = await committed(decode)
        assert (ended.num_tokens, ended.digest, list(ended.blocks)) == (tokens, 77, granted)
        assert (await committed(prefill)).lease == ended.lease
        assert (decode.read(blocks[1], tokens) == prefill.read(blocks[0], tokens)).all()
        assert decode.others(granted) == before, "no other block is touched"


@pytest.mark.parametrize(("source", "target", "transport", "sizes", "mode", "heads"), covering())
@bounded
async def test_every_pair_of_splits_moves_the_same_bytes(
    source: tuple[int, int],
    target: tuple[int, int],
    transport: str,
    sizes: tuple[int, int],
    mode: str,
    heads: int,
) -> None:
    await move(
        spec_of(heads),
        Split(tensor=source[0], pipeline=source[1], block_size=sizes[0]),
        Split(tensor=target[0], pipeline=target[1], block_size=sizes[1]),
        config=CHECKED | {"transport": transport},
        mode=mode,
        tokens=103,
    )


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("sizes", [(16, 16), (16, 32), (32, 16), (8, 24), (24, 8)])
@pytest.mark.parametrize("mode", ["push", "pull"])
@bounded
async def test_whole_blocks_that_the_receiver_holds_are_not_sent(
    transport: str, sizes: tuple[int, int], mode: str
) -> None:
    await move(
        spec_of(2),
        Split(tensor=2, block_size=sizes[0]),
        Split(pipeline=2, block_size=sizes[1]),
        config=CHECKED | {"transport": transport},
        mode=mode,
        tokens=110,
        skip=3,
    )


@pytest.mark.parametrize("tokens", [1, 15, 16, 17, 31, 32, 33, 64])
@pytest.mark.parametrize("sizes", [(16, 32), (32, 16)])
@bounded
async def test_last_blocks_that_are_filled_in_part(tokens: int, sizes: tuple[int, int]) -> None:
    for mode in ("push", "pull"):
        await move(
            spec_of(2),
            Split(block_size=sizes[0]),
            Split(block_size=sizes[1]),
            config=WHOLE,  # small: whole at its commit
            mode=mode,
            tokens=tokens,
        )


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("sizes", SIZES)
@bounded
async def test_fp8_blocks_move_with_their_scales(transport: str, sizes: tuple[int, int]) -> None:
    await move(
        spec_of(4),
        Split(tensor=2, block_size=sizes[0], dtype="fp8_e4m3"),
        Split(tensor=4, pipeline=2, block_size=sizes[1], dtype="fp8_e4m3"),
        config=CHECKED | {"transport": transport},
        mode="push",
        tokens=70,
    )


WHOLE: dict[str, Any] = {"checksum": True, "answer_s": 5.0, "silence_s": 5.0}
SPREAD = (Split(tensor=4, pipeline=2), Split(tensor=2, block_size=32))  # some ranks send nothing


async def opened(prefill: Side, decode: Side, there: Any, blocks: list[int]) -> int:
    """A lease that was granted."""
    lease = prefill.kv.new_lease()
    asking = asyncio.create_task(prefill.kv.ask(there, lease, 2 * len(blocks)))
    asked = await decode.next()
    assert isinstance(asked, Asked)
    assert decode.kv.answer(asked, blocks)
    assert await asyncio.wait_for(asking, BOUND_S)
    return lease


async def ended_once(side: Side, lease: int) -> Outcome:
    ended = await side.next()
    assert isinstance(ended, Ended) and ended.lease == lease, ended
    return ended.outcome


@bounded
async def test_a_refusal_on_every_leg_lets_the_prompt_be_parked_and_fetched() -> None:
    async with sides(spec_of(2), *SPREAD, WHOLE) as (prefill, decode, here, there):
        lease = prefill.kv.new_lease()
        asking = asyncio.create_task(prefill.kv.ask(there, lease, 4))
        asked = await decode.next()
        assert isinstance(asked, Asked) and asked.num_blocks == 2
        decode.kv.answer(asked, None)
        assert not await asyncio.wait_for(asking, BOUND_S)
        prefill.write(np.ones((3, 2, 2, 60, 24), np.uint8), [4, 3, 2, 1])
        prefill.kv.park(lease, [4, 3, 2, 1], 60, 7)
        await decode.kv.grant(here, lease, [8, 9], 7)
        assert await ended_once(decode, lease) is Outcome.COMMITTED
        assert await ended_once(prefill, lease) is Outcome.COMMITTED
        assert (decode.read([8, 9], 60) == prefill.read([4, 3, 2, 1], 60)).all()


@pytest.mark.parametrize("by", ["prefill", "decode"])
@bounded
async def test_an_abort_ends_all_legs_and_gives_the_blocks_back_once(by: str) -> None:
    async with sides(spec_of(2), *SPREAD, WHOLE) as (prefill, decode, _, there):
        lease = await opened(prefill, decode, there, [8, 9])
        (prefill if by == "prefill" else decode).kv.abort(lease)
        assert await ended_once(prefill, lease) is Outcome.ABORTED
        assert await ended_once(decode, lease) is Outcome.ABORTED
        released = await decode.next()
        assert isinstance(released, Released) and released.blocks == (8, 9)
        await opened(prefill, decode, there, [8, 9])  # nothing of the first is in its way


@bounded
async def test_what_is_parked_on_all_ranks_is_discarded_on_all() -> None:
    async with sides(spec_of(2), *SPREAD, WHOLE) as (prefill, decode, here, _):
        lease = prefill.kv.new_lease()
        prefill.kv.park(lease, [4, 3, 2, 1], 60, 7)
        decode.kv.discard(here, lease)
        assert await ended_once(prefill, lease) is Outcome.ABORTED


@bounded
async def test_kv_of_other_tokens_is_committed_on_no_leg() -> None:
    async with sides(spec_of(2), *SPREAD, WHOLE) as (prefill, decode, here, _):
        lease = prefill.kv.new_lease()
        prefill.kv.park(lease, [4, 3, 2, 1], 60, 7)
        await decode.kv.grant(here, lease, [8, 9], 8)
        assert await ended_once(decode, lease) is Outcome.ABORTED
        assert isinstance(await decode.next(), Released)
        assert await ended_once(prefill, lease) is Outcome.ABORTED


@bounded
async def test_a_sender_that_goes_leaves_no_leg_open() -> None:
    async with sides(spec_of(2), *SPREAD, WHOLE) as (prefill, decode, _, there):
        lease = await opened(prefill, decode, there, [8, 9])
        await prefill.close()
        assert await ended_once(decode, lease) in (Outcome.LOST, Outcome.ABORTED)
        assert isinstance(await decode.next(), Released)


@bounded
async def test_block_sizes_that_do_not_divide_are_refused_by_name() -> None:
    with pytest.raises(PeerRefused, match="neither divides the other"):
        async with sides(spec_of(2), Split(block_size=16), Split(block_size=24), WHOLE):
            pass
