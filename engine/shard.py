"""How the ranks of one worker compute together: sums over a stage, hand-over between stages.

The door of torch.distributed. Groups belong to one worker: they meet in its leader's store and
there is no global group, so that workers of one process or host know nothing of each other. gloo on
CPU, NCCL between GPUs. Used by a rank's compute thread only, but for `abort`.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._C._distributed_c10d import BroadcastOptions, PrefixStore, Store, TCPStore
from torch.distributed import ProcessGroupGloo

from .errors import RankLost
from .shard_plan import Shard

LEADER = 0
WAIT_S = 60.0  # longest wait for another rank: it may compute a long part meanwhile
SLICE_S = 0.5
Way = tuple[int, int]  # from rank, to rank
T = TypeVar("T")


def serve_store(host: str, timeout_s: float) -> tuple[Store, int]:
    """A store for one worker's ranks, listening on `host`; its port."""
    listener = socket.create_server((host, 0))
    port = listener.getsockname()[1]
    store = TCPStore(
        host,
        port,
        is_master=True,
        wait_for_workers=False,
        timeout=timedelta(seconds=timeout_s),
        master_listen_fd=listener.detach(),
    )
    return store, port


def join_store(host: str, port: int, timeout_s: float) -> Store:
    """Another rank's store. Raises RankLost when nobody answers."""
    timeout = timedelta(seconds=timeout_s)
    return _or_lost(lambda: TCPStore(host, port, is_master=False, timeout=timeout))


class RankLinks:
    """One rank's way to the others. Every rank of the worker calls the same in the same order."""

    def __init__(
        self,
        shard: Shard,
        store: Store,
        device: torch.device,
        host: str,  # where this rank listens, as the others reach it
        timeout_s: float = WAIT_S,
    ) -> None:
        """Meets the other ranks. An operation that takes `timeout_s` raises RankLost."""
        self.shard = shard
        self._device = device

        self._is_gloo = device.type == "cpu"
        self._aborted = False

        def group(name: str, rank: int, size: int) -> Any:
            own = PrefixStore(name, store)
            return _or_lost(lambda: _group(own, rank, size, device, host, timeout_s))

        self._stage = None
        if shard.tensor_parallel > 1:
            size = shard.tensor_parallel
            self._stage = group(f"stage-{shard.stage}", shard.tensor_rank, size)
        # From one rank to another by a broadcast of two: a hung receive could not be given up.
        self._ways = {
            way: group(f"{way[0]}-{way[1]}", way.index(shard.rank), 2)
            for way in _ways(shard)
            if shard.rank in way
        }
        self._sending: list[tuple[Any, Tensor]] = []  # kept until they are out

    def reduce(self, x: Tensor) -> None:
        """Sum `x` over the ranks of the stage, in place."""
        assert self._stage is not None, "one rank has nothing to add"
        if x.numel():
            stage = self._stage
            self._finish(_or_lost(lambda: stage.allreduce([x])))

    def hand_on(self, hidden: Tensor) -> None:
        """Send to the next stage; does not wait for it."""
        self._send(hidden, self.shard.rank + self.shard.tensor_parallel)

    def receive(self, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        """What the stage before handed on, in order."""
        return self._receive(self.shard.rank - self.shard.tensor_parallel, shape, dtype)

    def gather(self, logits: Tensor | None, wanted: int, vocab: list[range]) -> Tensor | None:
        """Whole rows of logits [wanted, vocabulary], at the leader where any are; else None.

        `logits` are a last stage's own, `vocab` each tensor rank's share.
        """
        shard = self.shard
        if not wanted:
            return None
        if shard.rank != LEADER:
            if logits is not None:
                self._send(logits, LEADER)
            return None
        first = shard.num_ranks - shard.tensor_parallel
        slices = [
            logits
            if logits is not None and tensor_rank == LEADER
            else self._receive(first + tensor_rank, (wanted, len(share)), torch.float32)
            for tensor_rank, share in enumerate(vocab)
        ]
        return torch.cat(slices, dim=1)

    def flush(self) -> None:
        """Wait until all that was sent is out."""
        for work, _ in self._sending:
            self._finish(work)
        self._sending.clear()

    def abort(self) -> None:
        """Give up: whoever waits in an operation gets RankLost. From any thread."""
        self._aborted = True
        for group in (*filter(None, (self._stage,)), *self._ways.values()):
            group.abort()

    def _send(self, x: Tensor, rank: int) -> None:
        x = x.contiguous()
        if x.numel():
            self._sending.append((self._broadcast(x, (self.shard.rank, rank)), x))

    def _receive(self, rank: int, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        x = torch.empty(shape, dtype=dtype, device=self._device)
        if x.numel():
            self._finish(self._broadcast(x, (rank, self.shard.rank)))
        return x

    def _broadcast(self, x: Tensor, way: Way) -> Any:
        options = BroadcastOptions()
        options.rootRank = options.rootTensor = 0
        return _or_lost(lambda: self._ways[way].broadcast([x], options))

    def _finish(self, work: Any) -> None:
        """Wait for an operation; on gloo in slices, for it does not hear of `abort`."""
        if not self._is_gloo:
            _or_lost(work.wait)
            return
        deadline_s = time.monotonic() + WAIT_S
        while True:
            try:
                work.wait(timedelta(seconds=SLICE_S))
                return
            except RuntimeError as error:
                over = work.is_completed() or time.monotonic() > deadline_s
                if self._aborted or over:
                    raise RankLost(f"a rank of this worker does not answer: {error}") from error


def _ways(shard: Shard) -> list[Way]:
    """Who sends to whom in this worker, in one order for all: hidden states from stage to stage,
    logits from the last stage to the leader."""
    size, last = shard.tensor_parallel, shard.num_ranks - shard.tensor_parallel
    onward = [(rank, rank + size) for rank in range(last)]
    return onward + [(last + rank, LEADER) for rank in range(size) if last + rank != LEADER]


def _group(
    store: Store, rank: int, size: int, device: torch.device, host: str, timeout_s: float
) -> Any:
    timeout = timedelta(seconds=timeout_s)
    if device.type == "cuda":
        from torch.distributed import ProcessGroupNCCL  # builds of torch for CPU have none

        options = ProcessGroupNCCL.Options()
        options._timeout = timeout
        return ProcessGroupNCCL(store, rank, size, options)
    options = ProcessGroupGloo._Options()  # pyright: ignore[reportAttributeAccessIssue]
    options._devices = [ProcessGroupGloo.create_device(hostname=host)]
    options._timeout = timeout
    return ProcessGroupGloo(store, rank, size, options)


def _or_lost(operation: Callable[[], T]) -> T:
    try:
        return operation()
    except RuntimeError as error:  # what torch raises for timeouts and broken connections
        raise RankLost(f"a rank of this worker does not answer: {error}") from error
