"""One rank of a worker as a process of its own, started on a node as the launcher does it."""

from __future__ import annotations

from phasewise.cluster.spec import WorkerSpec
from phasewise.cluster.worker_actor import FollowerActor, Started, WorkerActor


def lead(spec: WorkerSpec, node: str) -> None:
    """Prints where followers shall come, then where the worker is; ends with its input."""
    actor = WorkerActor(spec)
    print(actor.listen(node), flush=True)
    started = actor.start(node)
    print(started.address if isinstance(started, Started) else started, flush=True)
    input()
    actor.stop(0.0)


def follow(spec: WorkerSpec, address: str, node: str) -> None:
    FollowerActor(spec, 1).follow(address, node)
