"""The small parts: pool memory, frames, checksums, runs, copier, breaker, late writes."""

from __future__ import annotations

import contextlib
import os
import queue
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from phasewise.engine.errors import InvalidConfig
from phasewise.engine.request import WorkerId
from phasewise.kv_transfer.breaker import LONGEST_S, Breaker
from phasewise.kv_transfer.copier import Cancel, Copier, Finish, Push, runs
from phasewise.kv_transfer.digest import block_checksum, token_digest
from phasewise.kv_transfer.events import TransferConfig
from phasewise.kv_transfer.fit import meet, whole
from phasewise.kv_transfer.layer_clock import LayerClock
from phasewise.kv_transfer.lease_receiver import ReceiverTable
from phasewise.kv_transfer.memory import PoolMemory
from phasewise.kv_transfer.messages import (
    HEAD,
    MAX_FRAME,
    Abort,
    Grant,
    MalformedFrame,
    Ready,
    encode,
    framed,
    pack_blocks,
    split,
    unpack_blocks,
)
from phasewise.kv_transfer.shm import ShmWriter

from .harness import LAYOUT, pool_bytes

blocks = st.lists(st.integers(0, 63), unique=True, min_size=1, max_size=20)


def pool(seed: int) -> tuple[PoolMemory, np.ndarray]:
    memory = PoolMemory(LAYOUT.num_bytes)
    array = np.frombuffer(memory.buffer, np.uint8).reshape(pool_bytes(0).shape)
    array[:] = pool_bytes(seed)
    return memory, array


def test_two_mappings_of_a_pool_are_one_memory() -> None:
    memory = PoolMemory(1 << 16, prefault=True)
    other = PoolMemory.attach(os.dup(memory.fd), 1 << 16)
    memory.buffer[77] = 5
    assert other.buffer[77] == 5
    other.canary(3)[:2] = b"ok"
    assert bytes(memory.canary(3)[:2]) == b"ok"
    other.unmap()
    memory.close()


def test_a_descriptor_that_is_no_sealed_pool_is_refused() -> None:
    fd = os.memfd_create("not-a-pool")
    os.ftruncate(fd, 1 << 20)
    with pytest.raises(ValueError, match="not a sealed pool"):
        PoolMemory.attach(fd, 1 << 16)
    with pytest.raises(OSError):
        os.fstat(fd)  # it was closed


@given(blocks, st.randoms(use_true_random=False))
def test_runs_cover_the_same_pairs_in_order(source: list[int], rng) -> None:  # noqa: ANN001
    target = sorted(source) if rng.random() < 0.5 else rng.sample(range(64), len(source))
    copies = runs(source, target)
    pairs = [(s + i, t + i) for s, t, count in copies for i in range(count)]
    assert pairs == list(zip(source, target, strict=True))
    for (s, t, count), (s2, t2, _) in zip(copies, copies[1:], strict=False):
        assert (s + count, t + count) != (s2, t2), "neighbours are one copy"


@given(blocks)
def test_block_lists_survive_the_wire(numbers: list[int]) -> None:
    grant = Grant(2**64 - 1, 7, 1, pack_blocks(tuple(numbers)))
    (again,) = split(bytearray(encode(grant)))
    assert again == grant
    assert isinstance(again, Grant) and unpack_blocks(again.blocks) == tuple(numbers)


@given(st.binary(max_size=200))
def test_any_bytes_are_messages_or_malformed(data: bytes) -> None:
    with contextlib.suppress(MalformedFrame):
        split(bytearray(data))


@pytest.mark.parametrize(
    "body", [b"\x91\x63", b"\x92\x08\x01", b"\x92\x08\xa1x", b"\x93\x01\xff\x01", b"\xc0"]
)
def test_a_malformed_frame_is_taken_off_and_the_next_is_read(body: bytes) -> None:
    buffer = bytearray(framed(body) + encode(Ready(b"x")))
    with pytest.raises(MalformedFrame):
        split(buffer)
    assert split(buffer) == [Ready(b"x")]


@given(st.integers(0, 10_000), st.integers(0, 7))
def test_a_frame_with_a_changed_bit_is_no_message(at: int, bit: int) -> None:
    buffer = bytearray(encode(Grant(7, 8, 9, pack_blocks((1, 2, 3)))))
    buffer[at % len(buffer)] ^= 1 << bit
    with contextlib.suppress(MalformedFrame):
        assert split(buffer) == [], "at most it waits for more bytes"


def test_a_frame_longer_than_allowed_is_refused_before_it_is_read() -> None:
    with pytest.raises(MalformedFrame, match="bytes"):
        split(bytearray(HEAD.pack(MAX_FRAME + 1, 0)))


def test_an_unknown_outcome_is_malformed() -> None:
    frame = encode(Abort(1, 1, 0, "fine", "", True, True))
    with pytest.raises(MalformedFrame, match="fine"):
        split(bytearray(frame))


@given(blocks, st.data())
def test_checksum_sees_a_changed_or_misplaced_block(chosen: list[int], data: st.DataObject) -> None:
    memory, array = pool(3)
    before = block_checksum(memory, LAYOUT, chosen)
    assert before == block_checksum(memory, LAYOUT, chosen)
    words = array.view(np.uint64)[data.draw(st.integers(0, 3)), chosen[0]]
    one, other = data.draw(st.lists(st.integers(0, len(words) - 1), min_size=2, max_size=2))
    words[one] = words[other] ^ np.uint64(1 << data.draw(st.integers(0, 63)))
    before = block_checksum(memory, LAYOUT, chosen)
    if one != other:
        words[[one, other]] = words[[other, one]]
        assert before != block_checksum(memory, LAYOUT, chosen), "two words changed places"
        words[[one, other]] = words[[other, one]]
    if len(chosen) > 1:
        assert before != block_checksum(memory, LAYOUT, [*chosen[1:], chosen[0]])
    layer, block = data.draw(st.integers(0, 3)), data.draw(st.sampled_from(chosen))
    array[layer, block, data.draw(st.integers(0, LAYOUT.block_bytes - 1))] ^= 1
    assert before != block_checksum(memory, LAYOUT, chosen)


def test_token_digest_depends_on_order_and_length() -> None:
    assert token_digest([1, 2]) == token_digest((1, 2))
    assert len({token_digest(t) for t in ([1, 2], [2, 1], [1], [1, 2, 0], [])}) == 5


def test_copier_follows_the_clock_and_obeys_a_cancel() -> None:
    (mine, _), (theirs, arrived) = pool(2), pool(1)
    told: queue.Queue[tuple[str, int, int | None]] = queue.Queue()
    writer = ShmWriter(mine, LAYOUT, theirs, LAYOUT)
    window = meet(whole(LAYOUT), whole(LAYOUT)).out.mine
    copier = Copier(writer, window, lambda *what: told.put(what))
    clocks = [LayerClock(), LayerClock()]
    for lease, clock in enumerate(clocks):
        push = Push(
            lease=lease, generation=1, first=0, source=(1, 2), target=(8 + lease, 5), clock=clock
        )
        copier.submit(push)
        copier.submit(Finish(lease, (1, 2), None))
    clocks[0].finish(0)
    copier.submit(Cancel(0))  # with three layers to come
    assert told.get(timeout=10) == ("drained", 0, None)
    clocks[0].finish(3)
    clocks[1].finish(3)
    assert told.get(timeout=10) == ("finished", 1, None)
    assert np.array_equal(arrived[:, 9], pool_bytes(2)[:, 1])
    assert np.array_equal(arrived[1:, 8], pool_bytes(1)[1:, 8])
    assert copier.idle
    copier.close()
    assert told.get(timeout=10) == ("closed", 0, None)
    copier.join()


def test_a_late_write_under_an_earlier_generation_is_refused() -> None:
    table = ReceiverTable(num_layers=1, block_bytes=8, lease_s=10)
    peer = WorkerId(name="p", incarnation=1)
    generations = []
    for target in ((1,), (2,)):
        table.fetch(1, peer, 9, target, 0, True, 0.0)
        entry = table.get(9)
        assert entry is not None
        generations.append(entry.generation)
        if target == (1,):
            table.lost(1, "gone", drained=True)
    assert table.begin_write(1, 9, generations[0], 0, 0, 1) is None
    assert table.begin_write(2, 9, generations[1], 0, 0, 1) is None
    assert table.begin_write(1, 9, generations[1], 0, 0, 1) == (2,)
    assert table.begin_write(1, 9, generations[1], 1, 0, 1) is None
    assert table.begin_write(1, 9, generations[1], 0, 1, 1) is None
    assert table.refused == {"late write": 2, "write out of range": 2}


def test_breaker_opens_longer_each_time_and_closes_on_success() -> None:
    breaker, now_s = Breaker(), 0.0
    waits = []
    for _ in range(12):
        breaker.failed(now_s)
        waits.append(breaker.wait_s(now_s))
        now_s += waits[-1]
        assert breaker.wait_s(now_s) == 0
    assert waits[0] < waits[3] < waits[-1] and waits[-1] == pytest.approx(LONGEST_S)
    breaker.succeeded()
    assert breaker.wait_s(now_s) == 0


@pytest.mark.parametrize("change", [{"transport": "pigeon"}, {"lease_s": 0.0}, {"silence_s": -1.0}])
def test_a_wrong_setting_is_refused_by_its_key(change: dict) -> None:
    with pytest.raises(InvalidConfig, match=f"transfer.{next(iter(change))}"):
        replace(TransferConfig(), **change)
