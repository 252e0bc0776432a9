"""How the ranks of one worker compute together: sums over a stage, hand-over between stages.

The door of torch.distributed. Groups belong to one worker: they meet in its leader's store and
there is no global group, so that workers of one process or host know nothing of each other. gloo on
CPU, NCCL between GPUs. Used by a rank's compute thread only, but for `abort`.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore
from torch.distributed import ProcessGroupGloo

from .errors import RankLost
from .shard_plan import Shard

LEADER = 0
WAIT_S = 60.0  # longest wait for another rank: it may compute a long part meanwhile
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

        def group(name: str, rank: int, size: int) -> Any:
            own = PrefixStore(name, store)
            return _or_lost(lambda: _group(own, rank, size, device, host, timeout_s))

        self._all = group("all", shard.rank, shard.num_ranks)  # from one to one only
        self._stage = None
        if shard.tensor_parallel > 1:
            size = shard.tensor_parallel
            self._stage = group(f"stage-{shard.stage}", shard.tensor_rank, size)
        self._sending: list[tuple[Any, Tensor]] = []  # kept until they are out

    def reduce(self, x: Tensor) -> None:
        """Sum `x` over the ranks of the stage, in place."""
        assert self._stage is not None, "one rank has nothing to add"
        if x.numel():
            stage = self._stage
            _or_lost(lambda: stage.allreduce([x]).wait())

    def hand_on(self, hidden: Tensor, part: int) -> None:
        """Send to the next stage; does not wait for it."""
        self._send(hidden, self.shard.rank + self.shard.tensor_parallel, part)

    def receive(self, part: int, like: tuple[int, int], dtype: torch.dtype) -> Tensor:
        """What the stage before handed on of this part of the step."""
        return self._receive(self.shard.rank - self.shard.tensor_parallel, part, like, dtype)

    def gather(self, logits: Tensor | None, wanted: int, vocab: list[range]) -> Tensor | None:
        """Whole rows of logits [wanted, vocabulary], at the leader where any are; else None.

        `logits` are a last stage's own, `vocab` each tensor rank's share.
        """
        shard = self.shard
        if not wanted:
            return None
        if shard.rank != LEADER:
            if logits is not None:
                self._send(logits, LEADER, 0)
            return None
        first = shard.num_ranks - shard.tensor_parallel
        slices = [
            logits
            if logits is not None and tensor_rank == LEADER
            else self._receive(first + tensor_rank, 0, (wanted, len(share)), torch.float32)
            for tensor_rank, share in enumerate(vocab)
        ]
        return torch.cat(slices, dim=1)

    def flush(self) -> None:
        """Wait until all that was sent is out."""
        for work, _ in self._sending:
            _or_lost(work.wait)
        self._sending.clear()

    def abort(self) -> None:
        """Give up: whoever waits in an operation gets an error. From any thread."""
        for group in filter(None, (self._stage, self._all)):
            group.abort()

    def _send(self, x: Tensor, rank: int, tag: int) -> None:
        x = x.contiguous()
        if x.numel():
            self._sending.append((_or_lost(lambda: self._all.send([x], rank, tag)), x))

    def _receive(self, rank: int, tag: int, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        x = torch.empty(shape, dtype=dtype, device=self._device)
        if x.numel():
            _or_lost(lambda: self._all.recv([x], rank, tag).wait())
        return x


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
