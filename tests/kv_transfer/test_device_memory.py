"""Pools on a GPU, with host memory for a device: handles, mappings, copies and what may fail."""

from __future__ import annotations

import ctypes
import enum
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import numpy as np
import pytest
from phasewise.engine.errors import InvalidConfig
from phasewise.engine.request import TransferAddress, WorkerId
from phasewise.kv_transfer.device_memory import DeviceError, DeviceMemory, Gpu, PeerDeviceMemory
from phasewise.kv_transfer.endpoint import KVEndpoint
from phasewise.kv_transfer.events import Ended, Outcome, PeerUnavailable, TransferConfig
from phasewise.kv_transfer.layer_clock import LayerClock
from phasewise.kv_transfer.ways import ways_of

from .harness import LAYERED, LAYOUT, bounded, pool_bytes


class Handle:
    reserved = b""


class HostRuntime:
    """cuda-bindings' answers, with memory of this process: one mapping is the memory itself."""

    cudaIpcMemHandle_t = Handle  # noqa: N815

    class cudaMemcpyKind(enum.IntEnum):  # noqa: N801
        cudaMemcpyDefault = 4

    def __init__(self, *, reachable: bool = True) -> None:
        self.reachable = reachable
        self.owned: dict[int, object] = {}
        self.mapped: list[int] = []

    def cudaMalloc(self, size: int) -> tuple[int, int]:  # noqa: N802
        memory = ctypes.create_string_buffer(size)
        self.owned[ctypes.addressof(memory)] = memory
        return 0, ctypes.addressof(memory)

    def cudaMemset(self, address: int, value: int, size: int) -> tuple[int]:  # noqa: N802
        ctypes.memset(address, value, size)
        return (0,)

    def cudaFree(self, address: int) -> tuple[int]:  # noqa: N802
        del self.owned[address]
        return (0,)

    def cudaIpcGetMemHandle(self, address: int) -> tuple[int, Handle]:  # noqa: N802
        handle = Handle()
        handle.reserved = address.to_bytes(64, "little")
        return 0, handle

    def cudaIpcOpenMemHandle(self, handle: Handle, flags: int) -> tuple[int, int]:  # noqa: N802
        address = int.from_bytes(handle.reserved, "little")
        if not self.reachable or flags != 1:
            return 217, 0  # cudaErrorPeerAccessUnsupported
        self.mapped.append(address)
        return 0, address

    def cudaIpcCloseMemHandle(self, address: int) -> tuple[int]:  # noqa: N802
        self.mapped.remove(address)
        return (0,)

    def cudaMemcpy(self, target: int, source: int, size: int, kind: int) -> tuple[int]:  # noqa: N802
        ctypes.memmove(target, source, size)
        return (0,)


def host_copy(source, target, *, num_layers, num_blocks, block_bytes) -> None:  # noqa: ANN001
    """What the copy kernel does with two places."""
    for layer in range(num_layers):
        for here, there in zip(source.blocks.tolist(), target.blocks.tolist(), strict=True):
            read = source.address + layer * source.layer_stride + here * source.block_stride
            write = target.address + layer * target.layer_stride + there * target.block_stride
            ctypes.memmove(write, read, block_bytes)
    assert num_blocks == len(source.blocks)


def host_gpu(runtime: HostRuntime) -> Gpu:
    """cuda_ipc gathers and scatters nothing."""
    return Gpu(runtime, "cpu", host_copy, gather=not_called, scatter=not_called)


def not_called(*arguments: object, **named: object) -> None:
    raise AssertionError("only a group has staging buffers")


def pool_of(memory: DeviceMemory) -> np.ndarray:
    span = (ctypes.c_uint8 * memory.num_bytes).from_address(memory.address)
    return np.frombuffer(span, np.uint8).reshape(pool_bytes(0).shape)


@asynccontextmanager
async def on_device(
    name: str, seed: int, runtime: HostRuntime, transport: str = "cuda_ipc"
) -> AsyncIterator[tuple[KVEndpoint, TransferAddress, np.ndarray]]:
    memory = DeviceMemory(LAYOUT.num_bytes, host_gpu(runtime))
    pool = pool_of(memory)
    pool[:] = pool_bytes(seed)
    config = TransferConfig(**{**LAYERED, "transport": transport})
    endpoint = KVEndpoint(WorkerId(name=name, incarnation=1), LAYOUT, memory, config)
    try:
        yield endpoint, await endpoint.start(), pool
    finally:
        await endpoint.close()
        memory.close()
        assert not runtime.owned


@bounded
async def test_a_layer_that_is_ready_is_written_into_the_peers_pool() -> None:
    here, there = HostRuntime(), HostRuntime()
    async with (
        on_device("prefill", 2, here) as (prefill, back, _),
        on_device("decode", 1, there) as (decode, address, pool),
    ):
        assert await prefill.connect(address) == "cuda_ipc"
        lease = prefill.new_lease()
        events = decode.events()
        prefill.park(lease, [1, 2, 40], 40, 7)
        await decode.grant(back, lease, [9, 3, 4], 7)
        ended = await anext(events)
        assert isinstance(ended, Ended) and ended.outcome is Outcome.COMMITTED
        expected = pool_bytes(1)
        expected[:, [9, 3, 4]] = pool_bytes(2)[:, [1, 2, 40]]
        assert np.array_equal(pool, expected)
        assert len(here.mapped) == len(there.mapped) == 1
    assert not here.mapped and not there.mapped  # a dead owner's memory would stay pinned


@bounded
async def test_memory_that_cannot_be_mapped_is_an_unreachable_peer() -> None:
    async with (
        on_device("decode", 1, HostRuntime()) as (_, address, _),
        on_device("p", 2, HostRuntime(reachable=False)) as (p, _, _),
    ):
        with pytest.raises(PeerUnavailable, match="cudaIpcOpenMemHandle"):
            await p.connect(address)
        assert p.pairs() == ()


def test_a_handle_of_another_size_is_refused() -> None:
    with pytest.raises(DeviceError, match="3 bytes"):
        PeerDeviceMemory(b"abc", 64, host_gpu(HostRuntime()))


def test_canaries_and_blocks_of_a_device_are_read_back() -> None:
    memory = DeviceMemory(LAYOUT.num_bytes, host_gpu(HostRuntime()))
    memory.put_canary(5, b"x" * 64)
    assert memory.holds_canary(5, b"x" * 64) and not memory.holds_canary(6, b"x" * 64)
    pool_of(memory)[:] = pool_bytes(3)
    offset = LAYOUT.offset(2, 7)
    assert np.array_equal(memory.read(offset, LAYOUT.block_bytes), pool_bytes(3)[2, 7])
    memory.close()


def test_each_device_has_its_transports_and_others_are_refused_by_name() -> None:
    assert ways_of(TransferConfig(), "cpu") == ("shm", "tcp")
    assert ways_of(TransferConfig(), "cuda") == ("cuda_ipc", "nccl")
    assert ways_of(TransferConfig(transport="gloo"), "cpu") == ("gloo",)
    with pytest.raises(InvalidConfig, match="tcp does not reach KV on cuda"):
        ways_of(TransferConfig(transport="tcp"), "cuda")


def test_marks_stand_for_all_layers_before_them() -> None:
    marks = iter("abc")
    clock = LayerClock(0, lambda: next(marks))
    clock.finish(1)
    clock.finish(2)
    assert [clock.mark_of(layer) for layer in range(3)] == ["a", "a", "b"]
    assert LayerClock().mark_of(0) is None
