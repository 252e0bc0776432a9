"""What KV transfer is measured against: a plain copy, plain TCP and gloo, as bare as can be.

Each is a class for two processes. `prefill` sends one job and returns when decode has said that
all of it is readable; `decode` serves one job. They know their blocks beforehand and carry no
leases, so they bound from above what the same means allow.
"""

from __future__ import annotations

import socket
from ctypes import memmove
from datetime import timedelta
from multiprocessing.connection import Connection

import numpy as np
from phasewise.engine.layout import KVLayout
from phasewise.kv_transfer.memory import PoolMemory


class Memcpy:
    """One process copies block by block between the two pools: the limit of one thread."""

    def __init__(
        self, role: str, pools: dict[str, PoolMemory], layout: KVLayout, peer: Connection
    ) -> None:
        self.pools, self.layout = pools, layout

    def prefill(self, source: list[int], target: list[int]) -> None:
        size = self.layout.block_bytes
        for layer in range(self.layout.num_layers):
            start = self.layout.offset(layer, 0)
            here = self.pools["prefill"].address + start
            there = self.pools["decode"].address + start
            for block, other in zip(source, target, strict=True):
                memmove(there + other * size, here + block * size, size)

    def decode(self, source: list[int], target: list[int]) -> None:
        """Nothing to do: the copy is complete when it returns."""


class PlainTcp:
    """One connection; a scatter-gather call a layer; one byte back at the end."""

    def __init__(
        self, role: str, pools: dict[str, PoolMemory], layout: KVLayout, peer: Connection
    ) -> None:
        self.layout, self.buffer = layout, pools[role].buffer
        if role == "decode":
            listening = socket.create_server(("127.0.0.1", 0))
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 << 20)
            peer.send(listening.getsockname())
            self.sock = listening.accept()[0]
            listening.close()
        else:
            self.sock = socket.socket()
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 << 20)
            self.sock.connect(peer.recv())
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def prefill(self, source: list[int], target: list[int]) -> None:
        for layer in range(self.layout.num_layers):
            left = self._views(layer, source)
            while left:
                left = _rest(left, self.sock.sendmsg(left[:512]))
        assert self.sock.recv(1) == b"k"

    def decode(self, source: list[int], target: list[int]) -> None:
        for layer in range(self.layout.num_layers):
            left = self._views(layer, target)
            while left:
                left = _rest(left, self.sock.recvmsg_into(left[:512])[0])
        self.sock.sendall(b"k")

    def _views(self, layer: int, blocks: list[int]) -> list[memoryview]:
        size = self.layout.block_bytes
        starts = [self.layout.offset(layer, block) for block in blocks]
        return [self.buffer[start : start + size] for start in starts]


class Gloo:
    """A two-rank group of its own; one gathered buffer a layer, two in flight."""

    IN_FLIGHT = 2
    DONE = 1 << 20  # a tag no layer has

    def __init__(
        self, role: str, pools: dict[str, PoolMemory], layout: KVLayout, peer: Connection
    ) -> None:
        import torch
        import torch.distributed as dist

        torch.set_num_threads(1)
        self.torch, self.layout = torch, layout
        wait, first = timedelta(seconds=30), role == "prefill"
        if first:
            store = dist.TCPStore("127.0.0.1", 0, 2, True, wait, wait_for_workers=False)
            peer.send(store.port)
        else:
            store = dist.TCPStore("127.0.0.1", peer.recv(), 2, False, wait)
        prefix = dist.PrefixStore("pair", store)
        self.group = dist.ProcessGroupGloo(prefix, 0 if first else 1, 2, wait)
        self.other = 1 if first else 0
        words = np.frombuffer(pools[role].buffer, np.int64)  # uint8 gathers far slower
        shape = (layout.num_layers, layout.num_blocks, layout.block_bytes // 8)
        self.pool = torch.from_numpy(words).view(shape)
        self.done = torch.zeros(1, dtype=torch.uint8)

    def prefill(self, source: list[int], target: list[int]) -> None:
        index, sends = self.torch.tensor(source), []
        buffers = self._buffers(len(source))
        for layer in range(self.layout.num_layers):
            if layer >= self.IN_FLIGHT:
                sends[layer - self.IN_FLIGHT].wait()
            buffer = buffers[layer % self.IN_FLIGHT]
            self.torch.index_select(self.pool[layer], 0, index, out=buffer)
            sends.append(self.group.send([buffer], self.other, layer))
        for send in sends[-self.IN_FLIGHT :]:
            send.wait()
        self.group.recv([self.done], self.other, self.DONE).wait()

    def decode(self, source: list[int], target: list[int]) -> None:
        index, num_layers = self.torch.tensor(target), self.layout.num_layers
        buffers = self._buffers(len(target))
        receives = [
            self.group.recv([buffers[layer]], self.other, layer)
            for layer in range(min(self.IN_FLIGHT, num_layers))
        ]
        for layer in range(num_layers):
            receives[layer].wait()
            buffer, ahead = buffers[layer % self.IN_FLIGHT], layer + self.IN_FLIGHT
            self.pool[layer].index_copy_(0, index, buffer)
            if ahead < num_layers:
                receives.append(self.group.recv([buffer], self.other, ahead))
        self.group.send([self.done], self.other, self.DONE).wait()

    def _buffers(self, count: int) -> list:
        shape = (count, self.layout.block_bytes // 8)
        if getattr(self, "_kept", None) is None or self._kept[0].shape[0] != count:
            self._kept = [
                self.torch.empty(shape, dtype=self.torch.int64) for _ in range(self.IN_FLIGHT)
            ]
        return self._kept


def _rest(views: list[memoryview], done: int) -> list[memoryview]:
    """What is left to send or receive after `done` bytes."""
    assert done, "the peer hung up"
    at = 0
    while at < len(views) and done >= len(views[at]):
        done -= len(views[at])
        at += 1
    return [views[at][done:], *views[at + 1 :]] if at < len(views) else []
