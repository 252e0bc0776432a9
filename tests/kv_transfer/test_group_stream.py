"""Device work of a pair's group, its buffers included, is ordered by the group's own stream."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from phasewise.kv_transfer.collective import CollectiveReader, CollectiveWriter
from phasewise.kv_transfer.copier import Push
from phasewise.kv_transfer.group import Group, _exchange_word
from phasewise.kv_transfer.layer_clock import finished_clock
from phasewise.kv_transfer.lease_receiver import ReceiverTable
from phasewise.kv_transfer.memory import PoolMemory
from phasewise.kv_transfer.words import Words
from torch.utils._python_dispatch import TorchDispatchMode

from .harness import LAYOUT, bounded


class OnStream(Group):
    """Knows when what a thread does goes to its stream."""

    depth = 0

    @contextlib.contextmanager
    def on_stream(self) -> Iterator[None]:
        self.depth += 1
        yield
        self.depth -= 1


class Done:
    def wait(self, *timeout: Any) -> None: ...


class Wire:
    """What torch's process group is to `Group`: everything is there at once."""

    def send(self, *about: Any) -> Done:
        return Done()

    def recv(self, tensors: list[torch.Tensor], *about: Any) -> Done:
        tensors[0].fill_(7)
        return Done()


class Made(TorchDispatchMode):
    """Notes of every tensor that is made while this is active whether it was on the stream."""

    def __init__(self, group: OnStream) -> None:
        super().__init__()
        self.group, self.on_stream = group, list[bool]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._opname in ("empty", "full", "zeros_like"):
            self.on_stream.append(self.group.depth > 0)
        return func(*args, **kwargs or {})


@bounded
async def test_staging_buffers_are_made_on_the_groups_stream() -> None:
    group = OnStream(Wire(), 0, torch.device("cpu"), 1.0)
    memory = PoolMemory(LAYOUT.num_bytes)
    words, table = Words(memory, LAYOUT), ReceiverTable(num_layers=4, block_bytes=1, lease_s=1.0)
    ours, theirs = socket.socketpair()
    writer = CollectiveWriter("gloo", words, group, ours)
    reader = CollectiveReader(
        theirs, group, memory, words, table, 1, took=lambda actions: None, broke=pytest.fail
    )
    clock = finished_clock(LAYOUT.num_layers)
    push = Push(lease=1, generation=1, first=0, source=(3,), target=(5,), clock=clock)
    with Made(group) as made:
        writer.write(push, range(LAYOUT.num_layers))
        reader.read(0.0)
    assert made.on_stream == [True, True]
    reader.close()
    ours.close()
    theirs.close()
    memory.close()


def test_the_first_word_is_made_on_the_groups_stream() -> None:
    group = OnStream(Wire(), 0, torch.device("cpu"), 1.0)
    with Made(group) as made:
        _exchange_word(group, 0)
    assert made.on_stream == [True, True]
