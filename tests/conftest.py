"""How the tests run, whichever they are.

Property tests meet the same examples every time, and a busy machine is no failure;
`pytest --hypothesis-profile=default` looks for new ones.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
from hypothesis import settings

settings.register_profile("suite", deadline=None, derandomize=True)
settings.load_profile("suite")


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """What is imported here lives to the end: looking through it for garbage again and again
    would take a tenth of the tests' time."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()
        gc.freeze()


# The files that take longest, so that no process is left alone with one of them at the end: in
# turn one that waits, for starts and silences, and one that computes.
FIRST = (
    *("test_plans_validate", "test_ray_cluster", "test_unequal_splits", "test_lifecycle"),
    *("test_shard", "test_random_faults", "test_kernel_benchmark", "test_faults"),
    *("test_published_cases", "test_launched", "test_lease_protocol", "test_rank_faults"),
    *("test_prefix_cache", "test_triton_compiles", "test_token_exactness", "test_wire_faults"),
    *("test_triton_model", "test_calibrate", "test_search", "test_shard_faults"),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The rest by name, not by room, so that files that wait run beside others that compute."""
    places = {name: place for place, name in enumerate(FIRST)}
    items.sort(key=lambda item: (places.get(item.path.stem, len(FIRST)), item.path.name))
