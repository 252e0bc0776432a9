"""What a worker's KV pools hold of a prompt, put together over its ranks.

Workers hand their pools to nobody; a test finds them among its process's objects, as a debugger
would, and reads them while nothing moves.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence

import numpy as np
from phasewise.decode_worker.worker import DecodeWorker
from phasewise.engine.prefix import extend_hashes
from phasewise.kv_transfer.rank_endpoint import RankEndpoint
from phasewise.kv_transfer.rank_follower import FollowerEndpoint
from phasewise.kv_transfer.ranked import RankedEndpoint
from phasewise.prefill_worker.worker import PrefillWorker

Worker = PrefillWorker | DecodeWorker
KINDS = (PrefillWorker, DecodeWorker, RankEndpoint, FollowerEndpoint)


class LivePools:
    """Of the latest cluster in this process, of one worker a role."""

    def __init__(self) -> None:
        found = [thing for thing in gc.get_objects() if type(thing) in KINDS]
        self._ranks = [thing for thing in found if isinstance(thing, RankEndpoint)]
        self._workers = [thing for thing in found if isinstance(thing, Worker)]

    def kv(self, role: str, token_ids: Sequence[int]) -> np.ndarray:
        """[layers, 2, heads, tokens, bytes] of the prompt's full blocks, which the worker's
        prefix cache finds. Ranks that hold one head agree."""
        kind = PrefillWorker if role == "prefill" else DecodeWorker
        workers = [worker for worker in self._workers if isinstance(worker, kind)]
        worker = max(workers, key=lambda one: _leader(one).worker.incarnation)
        leader = _leader(worker).worker
        ranks = [rank for rank in self._ranks if rank.worker.incarnation == leader.incarnation]
        allocator = worker.scheduler.prefix.allocator
        blocks = allocator.lookup(extend_hashes([], token_ids, allocator.block_size))
        return _joined(ranks, blocks)


def _joined(ranks: list[RankEndpoint], blocks: list[int]) -> np.ndarray:
    parts = ranks[0]._held.parts
    assert len(ranks) == len(parts), "every rank is found"
    layers, heads = max(p.layers.stop for p in parts), max(p.kv_heads.stop for p in parts)
    layout = ranks[0]._layout
    ((_, row),) = layout.sections
    whole = np.zeros((layers, 2, heads, len(blocks) * layout.block_size, row), np.uint8)
    known = np.zeros((layers, heads), bool)
    for rank in ranks:
        part, layout = rank._held.own, rank._layout
        pool = np.frombuffer(rank._memory.buffer, np.uint8).reshape(*layout.shape[:5], row)
        own = np.concatenate([pool[:, block] for block in blocks], axis=3)
        at_layers = slice(part.layers.start, part.layers.stop)
        at_heads = slice(part.kv_heads.start, part.kv_heads.stop)
        if known[at_layers, at_heads].any():
            assert (whole[at_layers, :, at_heads] == own).all(), "ranks with one head agree"
        whole[at_layers, :, at_heads], known[at_layers, at_heads] = own, True
    assert known.all()
    return whole


def _leader(worker: Worker) -> RankEndpoint:
    return worker.kv._own if isinstance(worker.kv, RankedEndpoint) else worker.kv
