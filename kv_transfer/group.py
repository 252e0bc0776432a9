"""Two-rank process groups, one a pair: gloo between CPUs, NCCL between GPUs.

Built from a store under the pair's own epoch, beside any group that the worker's ranks have; no
global group is made. Sizes must agree on both sides (a receive that is too small kills the
process), so every receive is posted for a size that its sender named before.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor
from torch._C import _distributed_c10d as c10d
from torch._C._distributed_c10d import Store

from .memory import KVMemory

_MAX_TAG = 1 << 30


class GroupBroke(OSError):
    """The peer is gone or made no progress in time; the group is of no more use."""


class Group:
    """This side of a pair's group. `send` and `receive` only start; `Transfer.wait` ends.

    One thread sends, another receives. NCCL carries one direction at a time: over it a pair is
    used from prefill to decode only.
    """

    def __init__(self, raw: Any, rank: int, device: torch.device, stall_s: float) -> None:
        self.device = device
        self._raw, self._other = raw, 1 - rank
        self._stall = timedelta(seconds=stall_s)
        self._sent = self._received = 0
        self.stream = torch.cuda.Stream(device, priority=-1) if device.type == "cuda" else None

    def send(self, payload: Tensor) -> Transfer:
        """`payload` is contiguous and stays untouched until the transfer was waited for."""
        self._sent += 1
        with self.on_stream():
            work = self._started(lambda: self._raw.send([payload], self._other, _tag(self._sent)))
            return Transfer(work, self._stall, self.stream)

    def receive(self, into: Tensor) -> Transfer:
        """The peer's next payload, which is exactly as large as `into`."""
        self._received += 1
        tag = _tag(self._received)
        with self.on_stream():
            work = self._started(lambda: self._raw.recv([into], self._other, tag))
            return Transfer(work, self._stall, self.stream)

    def on_stream(self) -> contextlib.AbstractContextManager[Any]:
        """Device work of this thread goes to the group's stream."""
        return contextlib.nullcontext() if self.stream is None else torch.cuda.stream(self.stream)

    def wait_on_stream(self, mark: Any | None) -> None:
        """What is put on the stream from now on follows a layer's computation."""
        if self.stream is not None and mark is not None:
            self.stream.wait_event(mark)

    def wait_for_device(self) -> None:
        """Until what was put on the stream is done; sleeping, never spinning."""
        if self.stream is not None:
            event = torch.cuda.Event(blocking=True)
            event.record(self.stream)
            event.synchronize()

    def abandon(self) -> None:
        """Nothing more is wanted of the peer; NCCL's kernels leave the device."""
        if self.device.type == "cuda":
            self._raw.abort()

    def _started(self, start: Any) -> Any:
        try:
            return start()
        except RuntimeError as error:
            raise GroupBroke(str(error).split("\n")[0]) from error


class Transfer:
    """A send or a receive that was started."""

    def __init__(self, work: Any, stall: timedelta, stream: torch.cuda.Stream | None) -> None:
        self._work, self._stall = work, stall
        self._event = None
        if stream is not None:
            work.wait()  # orders the stream behind it, and returns at once
            self._event = torch.cuda.Event(blocking=True)
            self._event.record(stream)

    def wait(self) -> None:
        """Blocks, without the GIL. Raises GroupBroke. That a *send* ended says nothing of the
        peer: after its death a wait may even succeed."""
        try:
            if self._event is not None:
                self._event.synchronize()
            else:
                self._work.wait(self._stall)
        except RuntimeError as error:
            raise GroupBroke(str(error).split("\n")[0]) from error


def device_of(memory: KVMemory) -> torch.device:
    """Where a pool's blocks lie."""
    return torch.device(memory.device)


def join_store(host: str, port: int, timeout_s: float) -> Store:
    """The called side's store. Raises GroupBroke."""
    try:
        return c10d.TCPStore(host, port, is_master=False, timeout=timedelta(seconds=timeout_s))
    except RuntimeError as error:
        raise GroupBroke(str(error).split("\n")[0]) from error


def open_group(
    store: Store,
    epoch: str,
    rank: int,
    *,
    device: torch.device,
    host: str,
    open_s: float,
    stall_s: float,
) -> Group:
    """Meet the peer under `epoch`, and exchange a word each way. Blocks; raises GroupBroke."""
    mine = c10d.PrefixStore(epoch, store)
    timeout = timedelta(seconds=open_s)
    try:
        if device.type == "cuda":
            group = Group(_nccl(mine, rank, timeout), rank, device, stall_s)
        else:
            group = Group(_gloo(mine, rank, timeout, host), rank, device, stall_s)
    except RuntimeError as error:
        raise GroupBroke(str(error).split("\n")[0]) from error
    _exchange_word(group, rank)
    return group


def _gloo(store: Store, rank: int, timeout: timedelta, host: str) -> Any:
    options = c10d.ProcessGroupGloo._Options()  # pyright: ignore[reportAttributeAccessIssue]
    options._timeout = timeout
    options._devices = [c10d.ProcessGroupGloo.create_device(hostname=host)]
    return c10d.ProcessGroupGloo(store, rank, 2, options)


def _nccl(store: Store, rank: int, timeout: timedelta) -> Any:
    with _no_suicide():
        options = c10d.ProcessGroupNCCL.Options()
        options._timeout = timeout
        return c10d.ProcessGroupNCCL(store, rank, 2, options)


@contextlib.contextmanager
def _no_suicide() -> Iterator[None]:
    """By default NCCL's watchdog ends the process when a peer is gone. It is read when a group
    is made; ours learn of a death from the pair's control connection."""
    name = "TORCH_NCCL_ASYNC_ERROR_HANDLING"
    before = os.environ.get(name)
    os.environ[name] = "0"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _exchange_word(group: Group, rank: int) -> None:
    """Rank 0 first: over NCCL two sends at once would wait for each other."""
    with group.on_stream():  # where the words are made, sent and read, in this order
        word = torch.full((1,), 7, dtype=torch.int64, device=group.device)
        heard = torch.zeros_like(word)
        for speaker in (0, 1):
            (group.send(word) if speaker == rank else group.receive(heard)).wait()
        if int(heard) != 7:
            raise GroupBroke("the peer's first word arrived changed")


def _tag(number: int) -> int:
    return number % _MAX_TAG
