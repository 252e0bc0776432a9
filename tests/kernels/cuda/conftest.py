"""Runs kernels under Triton's interpreter, in a process of their own.

The interpreter is chosen when triton is imported, and the compile tests (and whatever else the
test process runs) need it off. Tensors travel through shared memory, so what a kernel writes in
place is seen here.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import pytest

CASE_TIMEOUT_S = 60

Interpreted = Callable[..., Any]


@pytest.fixture(scope="session")
def interpreted() -> Iterator[Interpreted]:
    """`interpreted(function, *args, **kwargs)`: the function's result, run interpreted."""
    before = set(multiprocessing.active_children())
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("TRITON_INTERPRET", "1")
        environment.setenv("OMP_NUM_THREADS", "1")
        pool = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))
        pool.submit(os.getpid).result(timeout=CASE_TIMEOUT_S)
    process = (set(multiprocessing.active_children()) - before).pop()

    def run(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return pool.submit(function, *args, **kwargs).result(timeout=CASE_TIMEOUT_S)

    yield run
    process.kill()
    pool.shutdown()
