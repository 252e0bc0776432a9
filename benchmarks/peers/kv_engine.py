"""A KV transfer engine of a peer, measured in the peer's own venv: NIXL or Mooncake, over TCP.

    VENV/bin/python benchmarks/peers/kv_engine.py nixl|mooncake

Run by `kv_transfer.py`, with numpy and the engine alone. Two processes, each with a pool of the
same shape; every line of standard input is a job as JSON, `[source blocks, target blocks, layers,
repeats]`, every line of standard output the seconds of its transfers, from their start until the
decode side's word is back. After each job the arrived blocks are compared with what was sent; a
wrong byte ends the script. The first line out is "ready".
"""

from __future__ import annotations

import json
import mmap
import multiprocessing
import os
import sys
import time
from multiprocessing.connection import Connection

import numpy as np

LAYERS, BLOCKS, BLOCK_BYTES = 32, 160, 65536  # as the LAYOUT of kv_transfer.py
WAIT_S = 60.0
MOST = 512  # entries that a Mooncake call takes


class Pool:
    """Shared by the script's processes, so that the parent can fill and compare."""

    def __init__(self) -> None:
        size = LAYERS * BLOCKS * BLOCK_BYTES
        self.words = np.frombuffer(mmap.mmap(-1, size), np.uint64)
        self.words = self.words.reshape(LAYERS, BLOCKS, BLOCK_BYTES // 8)
        self.address, self.size = self.words.ctypes.data, size

    def places(self, base: int, blocks: list[int], layers: int) -> np.ndarray:
        """Addresses of `blocks` in the first `layers` layers of a pool at `base`."""
        first = np.arange(layers, dtype=np.uint64)[:, None] * np.uint64(BLOCKS)
        index = first + np.array(blocks, np.uint64)[None]
        return (np.uint64(base) + index * np.uint64(BLOCK_BYTES)).ravel()


class Nixl:
    """UCX held to TCP; the writer's notification says that all is there."""

    def __init__(self, role: str, pool: Pool, peer: Connection) -> None:
        from nixl._api import nixl_agent, nixl_agent_config

        self.pool, self.peer = pool, peer
        self.agent = nixl_agent(role, nixl_agent_config(True, False, 0, backends=["UCX"]))
        self.agent.register_memory([(pool.address, pool.size, 0, "")], mem_type="DRAM")
        peer.send((self.agent.get_agent_metadata(), pool.address))
        metadata, self.theirs = peer.recv()
        name = self.agent.add_remote_agent(metadata)
        if role == "prefill":
            self.there = name if isinstance(name, str) else name.decode()
            every = list(range(BLOCKS))
            self.from_list = self._list("NIXL_INIT_AGENT", pool.places(pool.address, every, LAYERS))
            self.to_list = self._list(self.there, pool.places(self.theirs, every, LAYERS))

    def _list(self, agent: str, places: np.ndarray):  # noqa: ANN202
        sizes = np.full(len(places), BLOCK_BYTES, np.uint64)
        described = np.stack([places, sizes, np.zeros_like(sizes)], 1)
        return self.agent.prep_xfer_dlist(agent, described, mem_type="DRAM")

    def prefill(self, source: list[int], target: list[int], layers: int) -> None:
        first = np.arange(layers)[:, None] * BLOCKS
        ours = (first + np.array(source)[None]).ravel().astype(np.int32)
        others = (first + np.array(target)[None]).ravel().astype(np.int32)
        handle = self.agent.make_prepped_xfer(
            "WRITE", self.from_list, ours, self.to_list, others, b"done"
        )
        state, until_s = self.agent.transfer(handle), time.monotonic() + WAIT_S
        while state == "PROC" and time.monotonic() < until_s:
            time.sleep(20e-6)
            state = self.agent.check_xfer_state(handle)
        self.agent.release_xfer_handle(handle)
        assert state == "DONE", f"the transfer ended as {state}"
        self.peer.recv()

    def decode(self) -> None:
        until_s = time.monotonic() + WAIT_S
        while not self.agent.get_new_notifs():
            assert time.monotonic() < until_s, "no notification came"
            time.sleep(20e-6)
        self.peer.send(True)


class Mooncake:
    """Its transfer engine with its `tcp` protocol, and metadata exchanged between the two."""

    def __init__(self, role: str, pool: Pool, peer: Connection) -> None:
        from mooncake.engine import TransferEngine

        self.pool, self.peer = pool, peer
        self.engine = TransferEngine()
        assert self.engine.initialize("127.0.0.1", "P2PHANDSHAKE", "tcp", "") == 0
        assert self.engine.register_memory(pool.address, pool.size) == 0
        peer.send((f"127.0.0.1:{self.engine.get_rpc_port()}", pool.address))
        self.there, self.theirs = peer.recv()

    def prefill(self, source: list[int], target: list[int], layers: int) -> None:
        ours = self.pool.places(self.pool.address, source, layers).tolist()
        others = self.pool.places(self.theirs, target, layers).tolist()
        for at in range(0, len(ours), MOST):
            part = slice(at, at + MOST)
            sizes = [BLOCK_BYTES] * len(ours[part])
            code = self.engine.batch_transfer_sync_write(
                self.there, ours[part], others[part], sizes
            )
            assert code == 0, f"batch_transfer_sync_write gave {code}"
        self.peer.send(True)
        self.peer.recv()

    def decode(self) -> None:
        self.peer.recv()
        self.peer.send(True)


ENGINES = {"nixl": Nixl, "mooncake": Mooncake}
ENVIRONMENT = {
    "nixl": {"NIXL_LOG_LEVEL": "ERROR", "UCX_TLS": "tcp", "UCX_NET_DEVICES": "lo"},
    "mooncake": {"MC_LOG_LEVEL": "ERROR", "GLOG_minloglevel": "2", "MC_FORCE_TCP": "1"},
}


def serve(name: str, role: str, pool: Pool, peer: Connection, control: Connection) -> None:
    """One side, until it is killed."""
    os.dup2(2, 1)  # what the engine prints is no answer
    engine = ENGINES[name](role, pool, peer)
    control.send("ready")
    while True:
        source, target, layers, repeats = control.recv()
        seconds = []
        for _ in range(repeats):
            begin_s = time.perf_counter()
            if role == "prefill":
                engine.prefill(source, target, layers)
            else:
                engine.decode()
            seconds.append(time.perf_counter() - begin_s)
        control.send(seconds)


def answer(control: Connection) -> list[float]:
    if not control.poll(WAIT_S):
        raise TimeoutError("a side of the engine does not answer")
    return control.recv()


def check(pools: dict[str, Pool], source: list[int], target: list[int], layers: int) -> None:
    for layer in range(layers):
        sent, arrived = pools["prefill"].words[layer], pools["decode"].words[layer]
        for block, other in zip(source, target, strict=True):
            assert np.array_equal(sent[block], arrived[other]), f"wrong bytes in layer {layer}"


def main() -> None:
    name = sys.argv[1]
    os.environ.update(ENVIRONMENT[name])
    context = multiprocessing.get_context("fork")  # before the engine is loaded
    pools = {role: Pool() for role in ("prefill", "decode")}
    words = pools["prefill"].words
    words[:] = np.random.default_rng(0).integers(0, 1 << 63, words.shape, dtype=np.uint64)
    control = {}
    for role, peer in zip(pools, context.Pipe(), strict=True):
        control[role], theirs = context.Pipe()
        side = (name, role, pools[role], peer, theirs)
        context.Process(target=serve, args=side, daemon=True).start()
    for role in control:
        answer(control[role])
    print("ready", flush=True)
    for line in sys.stdin:
        source, target, layers, repeats = job = json.loads(line)
        pools["decode"].words[:, :, ::64] = 0xDEAD
        for role in ("decode", "prefill"):
            control[role].send(job)
        seconds = answer(control["prefill"])
        answer(control["decode"])
        check(pools, source, target, layers)
        print(json.dumps(seconds), flush=True)


if __name__ == "__main__":
    main()
