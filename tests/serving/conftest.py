"""What tests share: checkpoints."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from phasewise.tests.engine.test_exactness import Case


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Case]:
    """`case("llama")`: a small checkpoint of that family, one a module."""
    cases: dict[str, Case] = {}

    def build(name: str) -> Case:
        if name not in cases:
            cases[name] = Case(name, tmp_path_factory.mktemp(name))
        return cases[name]

    return build
