"""Two processes on one GPU: one pushes KV into the other's pool, and either is killed.

The push of 32 layers × 128 scattered blocks of 64 KiB (GB/s counts reads and writes), one block
with its acknowledgement, then SIGKILL of the sender and of the receiver in the middle of a push:
how soon the other one's terminal event comes, and that it goes on with a new peer. Every
transfer's bytes are compared.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import random
import statistics
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
from phasewise.engine.layout import KVLayout
from phasewise.engine.request import TransferAddress, WorkerId
from phasewise.kv_transfer.endpoint import KVEndpoint
from phasewise.kv_transfer.events import Asked, Ended, Outcome, Released, TransferConfig
from phasewise.kv_transfer.layer_clock import LayerClock, finished_clock
from phasewise.kv_transfer.memory import KVMemory, memory_on

LAYOUT = KVLayout(
    num_layers=32, num_blocks=160, num_kv_heads=8, block_size=32, head_dim=64, dtype="float16"
)
TINY = KVLayout(
    num_layers=4, num_blocks=10, num_kv_heads=8, block_size=32, head_dim=64, dtype="float16"
)
ANSWER_S = 60.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Setup:
    """What a child process is told."""

    name: str
    incarnation: int
    seed: int
    device: str
    layout: KVLayout


class Side:
    """A worker's transfer half in a child process; its methods are what the parent may ask."""

    def __init__(self, setup: Setup) -> None:
        self.layout = setup.layout
        self.memory: KVMemory = memory_on(setup.device, self.layout.num_bytes)
        fill(self.memory, setup.seed, self.layout)
        worker = WorkerId(name=setup.name, incarnation=setup.incarnation)
        config = TransferConfig(silence_s=2.0, answer_s=20.0)  # the first launch compiles
        self.endpoint = KVEndpoint(worker, self.layout, self.memory, config)
        self.events: AsyncIterator[Asked | Ended | Released] = self.endpoint.events()

    async def address(self) -> TransferAddress:
        return await self.endpoint.start()

    async def transport(self, peer: TransferAddress) -> str:
        return await self.endpoint.connect(peer)

    async def push(self, peer: TransferAddress, blocks: list[int], layers: int) -> float | int:
        """Seconds until the commit, or the lease when only `layers` of it are computed."""
        lease = self.endpoint.new_lease()
        assert await self.endpoint.ask(peer, lease, len(blocks)), "decode has room"
        whole = layers == self.layout.num_layers
        clock = finished_clock(layers) if whole else LayerClock()
        begin = time.perf_counter()
        self.endpoint.push(lease, blocks, 0, clock)
        if not whole:
            for layer in range(layers):
                clock.finish(layer)
            return lease
        self.endpoint.commit(lease, len(blocks) * self.layout.block_size, 0)
        await self.ended(Outcome.COMMITTED)
        return time.perf_counter() - begin

    async def grant(self, blocks: list[int]) -> None:
        asked = await anext(self.events)
        assert isinstance(asked, Asked), asked
        assert self.endpoint.answer(asked, blocks)

    async def ended(self, outcome: Outcome) -> float:
        """Waits for it; the time on the clock that all processes share."""
        event = await anext(self.events)
        assert isinstance(event, Ended) and event.outcome is outcome, event
        return time.monotonic()

    async def released(self) -> float:
        event = await anext(self.events)
        assert isinstance(event, Released), event
        return time.monotonic()

    async def same(self, seed: int, theirs: list[int], mine: list[int]) -> bool:
        layout = self.layout
        expected, size = contents(seed, layout), layout.block_bytes
        return all(
            np.array_equal(
                self.memory.read(layout.offset(layer, block), size), expected[layer, other]
            )
            for layer in range(layout.num_layers)
            for other, block in zip(theirs, mine, strict=True)
        )


class Child:
    """A `Side` in a process of its own, as the parent sees it."""

    def __init__(self, setup: Setup) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(setup, theirs), daemon=True)
        self.process.start()
        theirs.close()
        self.num_layers = setup.layout.num_layers
        self.address: TransferAddress = self.do("address")

    def begin(self, method: str, *arguments: Any) -> None:
        self.pipe.send((method, arguments))

    def result(self) -> Any:
        if not self.pipe.poll(ANSWER_S):
            raise TimeoutError(f"{self.process.name} did not answer")
        answer = self.pipe.recv()
        if isinstance(answer, BaseException):
            raise answer
        return answer

    def do(self, method: str, *arguments: Any) -> Any:
        self.begin(method, *arguments)
        return self.result()

    def kill(self) -> float:
        """SIGKILL; when."""
        now_s = time.monotonic()
        self.process.kill()
        self.process.join()
        return now_s


def _serve(setup: Setup, pipe: Connection) -> None:
    async def work() -> None:
        side = Side(setup)
        while True:
            method, arguments = await asyncio.to_thread(pipe.recv)
            try:
                pipe.send(await getattr(side, method)(*arguments))
            except Exception as error:  # the parent reports whatever it was
                pipe.send(error)

    asyncio.run(work())


def contents(seed: int, layout: KVLayout) -> np.ndarray:  # [layers, blocks, block_bytes]
    shape = (layout.num_layers, layout.num_blocks, layout.block_bytes)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def fill(memory: KVMemory, seed: int, layout: KVLayout) -> None:
    if memory.device == "cpu":
        np.frombuffer(memory.buffer, np.uint8)[:] = contents(seed, layout).reshape(-1)
        return
    import torch

    memory.buffer.copy_(torch.from_numpy(contents(seed, layout).reshape(-1)))
    torch.cuda.synchronize()


def transfer(prefill: Child, decode: Child, source: Sequence[int], target: Sequence[int]) -> float:
    """One whole push; its seconds."""
    prefill.begin("push", decode.address, list(source), prefill.num_layers)
    decode.do("grant", list(target))
    decode.do("ended", Outcome.COMMITTED)
    return prefill.result()


def half_way(prefill: Child, decode: Child, rng: random.Random, layout: KVLayout) -> None:
    """A push that waits for the second half of its layers."""
    source, target = scattered(rng, layout), scattered(rng, layout)
    prefill.begin("push", decode.address, source, layout.num_layers // 2)
    decode.do("grant", target)
    prefill.result()
    time.sleep(0.05)


def scattered(rng: random.Random, layout: KVLayout) -> list[int]:
    """Four fifths of the pool's blocks, in random order."""
    return rng.sample(range(layout.num_blocks), layout.num_blocks * 4 // 5)


def measured(
    device: str, layout: KVLayout, *, repeats: int, kills: bool
) -> Iterator[dict[str, Any]]:
    """Rows of figures, each as soon as it is known."""
    rng, numbers = random.Random(0), iter(range(1, 100))

    def child(name: str, seed: int) -> Child:
        number = next(numbers)
        return Child(Setup(name=name, incarnation=number, seed=seed, device=device, layout=layout))

    prefill, decode = child("prefill", 1), child("decode", 2)
    transport = prefill.do("transport", decode.address)
    blocks = layout.num_blocks * 4 // 5
    size = layout.num_layers * blocks * layout.block_bytes
    source, target = scattered(rng, layout), scattered(rng, layout)
    taken = [transfer(prefill, decode, source, target) for _ in range(repeats + 2)]
    assert decode.do("same", 1, source, target), "every byte arrived"
    seconds = statistics.median(taken[2:])
    yield {
        "what": f"{blocks} blocks, {layout.num_layers} layers",
        "transport": transport,
        "ms": seconds * 1e3,
        "gb_per_s": 2 * size / seconds / 1e9,
    }
    block = [transfer(prefill, decode, [3], [rng.randrange(blocks)]) for _ in range(repeats + 2)]
    yield {"what": "one block, all layers", "ms": statistics.median(block[2:]) * 1e3}
    if kills:
        yield from killed(prefill, decode, child, rng, layout)
    for one in multiprocessing.active_children():
        one.kill()


def killed(
    prefill: Child,
    decode: Child,
    child: Callable[[str, int], Child],
    rng: random.Random,
    layout: KVLayout,
) -> Iterator[dict[str, Any]]:
    """SIGKILL of either side in the middle of a push, and how the other one goes on."""
    half_way(prefill, decode, rng, layout)
    killed_s = prefill.kill()
    ended_s = decode.do("ended", Outcome.LOST)
    released_s = decode.do("released")
    prefill = child("prefill", 3)
    transfer(prefill, decode, [1, 2], [7, 8])
    assert decode.do("same", 3, [1, 2], [7, 8]), "the survivor serves a new sender"
    yield {
        "what": "sender killed",
        "ended_s": ended_s - killed_s,
        "released_s": released_s - killed_s,
    }
    half_way(prefill, decode, rng, layout)
    killed_s = decode.kill()
    ended_s = prefill.do("ended", Outcome.LOST)
    decode = child("decode", 4)
    transfer(prefill, decode, [5, 6], [1, 2])
    assert decode.do("same", 3, [5, 6], [1, 2]), "the survivor serves a new receiver"
    yield {"what": "receiver killed", "ended_s": ended_s - killed_s}
