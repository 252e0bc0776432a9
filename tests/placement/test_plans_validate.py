"""A plan made from config.json alone passes `validate`, on a machine without the weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from phasewise.cluster import cli
from phasewise.configs.load import load_file
from phasewise.configs.schema import ClusterConfig

from .plan_problems import CONFIGS, QUICK

MODELS = ("llama-3.1-8b", "llama-3.1-70b", "qwen3-32b", "mixtral-8x7b")
FEW = ("search.max_pipeline_parallel=1",)


def planned(name: str, out: Path, *overrides: str) -> int:
    words = [word for key in (*QUICK, *overrides) for word in ("--set", key)]
    return cli.main(["plan", str(CONFIGS / f"plan-{name}.yaml"), "-o", str(out), *words])


SMALL = ("llama-3.1-8b-h100", "mixtral-8x7b-h100")  # searched in no time


def every_pair() -> list[Any]:
    pairs = [(model, gpu) for model in MODELS for gpu in ("h100", "h200")]
    slow = pytest.mark.slow
    return [pytest.param(*p, marks=() if "-".join(p) in SMALL else slow) for p in pairs]


@pytest.mark.parametrize(("model", "gpu"), every_pair())
def test_a_plan_from_config_json_alone_is_valid(
    model: str, gpu: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "cluster.yaml"
    assert planned(f"{model}-{gpu}", out) == 0
    assert cli.main(["validate", str(out), "--without-weights"]) == 0
    capsys.readouterr()
    for elsewhere in ([], ["--set", "model.path=/models/elsewhere"]):
        assert cli.main(["validate", str(out), *elsewhere]) == 2, "these are no weights to serve"
        assert "--without-weights" in capsys.readouterr().err


def test_phases_that_are_split_differently_are_valid(tmp_path: Path) -> None:
    """Prefill and decode with tensor and pipeline parallelism of their own."""
    out = tmp_path / "cluster.yaml"
    assert planned("llama-3.1-70b-h100", out, "search.colocated=false", *FEW) == 0
    folder = CONFIGS / "models" / "llama-3.1-70b"
    splits = ["prefill.tensor_parallel=4", "decode.tensor_parallel=2", "decode.pipeline_parallel=2"]
    words = [word for key in (f"model.path={folder}", *splits) for word in ("--set", key)]
    assert cli.main(["validate", str(out), "--without-weights", *words]) == 0
    assert load_file(ClusterConfig, out).prefill.replicas > 0
