"""NVIDIA's kernel database as a source of step times: optional, and said so where it is missing."""

from __future__ import annotations

import importlib.util
import sys

import pytest
from phasewise.engine.errors import InvalidConfig
from phasewise.placement.latency.phase_latency import decode_features, prompt_features

from .plan_problems import problem

SOURCE = "latency.source=aiconfigurator"
INSTALLED = importlib.util.find_spec("aiconfigurator_core") is not None


def test_without_the_package_it_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "aiconfigurator_core", None)
    for name in [name for name in sys.modules if name.startswith("aiconfigurator_core.")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(InvalidConfig, match=r"phasewise\[aiconfigurator\]"):
        problem("llama-3.1-8b-h100", SOURCE)


def test_a_file_beside_it_is_refused() -> None:
    with pytest.raises(InvalidConfig, match=r"latency\.file"):
        problem("llama-3.1-8b-h100", SOURCE, "latency.file=profile.json")


@pytest.mark.skipif(not INSTALLED, reason="needs the optional package aiconfigurator-core")
def test_its_step_times_grow_with_what_a_step_holds() -> None:
    shape = next(s for s in problem("qwen3-32b-h200", SOURCE).shapes if s.tensor_parallel == 2)
    assert "not measured by us" in shape.prefill.origin
    prompts = [shape.prefill.total_s(prompt_features(tokens)) for tokens in (512, 2048, 8192)]
    rows = [shape.decode.total_s(decode_features(rows, 2048)) for rows in (1, 64, 256)]
    assert prompts == sorted(prompts) and rows == sorted(rows)
    assert 0.05 < prompts[1] < 0.2 and 0.005 < rows[0] < 0.02
