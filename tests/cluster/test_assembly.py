"""A worker that cannot be put together leaves nothing behind."""

from __future__ import annotations

import asyncio
import gc
import os
from pathlib import Path

import pytest
from phasewise.cluster.assembly import assemble
from phasewise.cluster.spec import WorkerSpec
from phasewise.configs.schema import (
    DecodeConfig,
    KVConfig,
    ModelConfig,
    SloConfig,
    TransferConfig,
)
from phasewise.engine.errors import InvalidConfig
from phasewise.engine.request import WorkerId

TINY = Path(__file__).parents[2] / "models" / "tiny"


def pools_open() -> int:
    """KV pools that this process holds a descriptor of."""
    links = [Path("/proc/self/fd") / name for name in os.listdir("/proc/self/fd")]
    return sum("phasewise-kv" in os.readlink(link) for link in links if link.is_symlink())


def test_a_transport_that_the_device_lacks_costs_no_pool() -> None:
    spec = WorkerSpec(
        worker=WorkerId(name="decode-0", incarnation=1),
        decode=DecodeConfig(threads=1),
        model=ModelConfig(path=TINY, max_model_len=256),
        kv=KVConfig(memory=4 << 20),
        transfer=TransferConfig(transport="nccl"),
        slo=SloConfig(),
    )

    async def work() -> None:
        async with assemble(spec):
            raise AssertionError("NCCL needs a GPU")

    gc.collect()  # what other tests of this process left
    before = pools_open()
    with pytest.raises(InvalidConfig, match="nccl") as refused:
        asyncio.run(asyncio.wait_for(work(), 60))
    del refused  # it holds the frames, and they what is mapped
    gc.collect()
    assert pools_open() <= before
