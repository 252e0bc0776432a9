"""One launched cluster that tests share: starting one takes ten seconds or more."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import pytest
from phasewise.tests.serving.launched import Launched


@pytest.fixture(scope="session")
def launch() -> Iterator[Callable[..., Launched]]:
    """`launch(["decode.replicas=2"])`: a running cluster, one for each set of overrides, stopped
    when the session ends."""
    running: dict[tuple[str, ...], Launched] = {}

    def get(overrides: Sequence[str] = ()) -> Launched:
        key = tuple(overrides)
        if key not in running or running[key].process.poll() is not None:
            running[key] = Launched(overrides)
            running[key].wait_ready()
        return running[key]

    yield get
    for launched in running.values():
        if launched.process.poll() is None:
            launched.stop()
