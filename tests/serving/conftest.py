"""What tests share: checkpoints, and launched clusters, which take ten seconds or more to start."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import pytest
from phasewise.tests.engine.test_exactness import Case
from phasewise.tests.serving.launched import Launched


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Case]:
    """`case("llama")`: a small checkpoint of that family, one a module."""
    cases: dict[str, Case] = {}

    def build(name: str) -> Case:
        if name not in cases:
            cases[name] = Case(name, tmp_path_factory.mktemp(name))
        return cases[name]

    return build


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
