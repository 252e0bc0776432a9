"""Which transports a worker has, and which of them two workers take."""

from __future__ import annotations

from ..engine.errors import InvalidConfig
from ..engine.request import TransferAddress
from .events import TransferConfig

NEIGHBOUR = ("shm", "cuda_ipc")  # between two processes of one host, over a unix socket
GROUP = ("gloo", "nccl")  # through a process group, its frames announced over TCP
_BY_DEVICE = {"cpu": ("shm", "tcp", "gloo"), "cuda": ("cuda_ipc", "nccl")}
_AUTO = {"cpu": ("shm", "tcp"), "cuda": ("cuda_ipc", "nccl")}


def ways_of(config: TransferConfig, device: str) -> tuple[str, ...]:
    """The transports that a worker's configuration and device allow, best first."""
    if config.transport == "auto":
        return _AUTO[device]
    if config.transport not in _BY_DEVICE[device]:
        raise InvalidConfig(
            "transfer.transport",
            f"{config.transport} does not reach KV on {device}",
            f"use auto or one of {', '.join(_BY_DEVICE[device])}",
        )
    return (config.transport,)


def ways_to(peer: TransferAddress, ways: tuple[str, ...], host_id: str) -> list[str]:
    """What to try with a peer, in order; it has its own say in the handshake."""
    return [
        way
        for way in ways
        if (peer.shm and peer.host_id == host_id if way in NEIGHBOUR else peer.tcp)
    ]
