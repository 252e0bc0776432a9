"""A plan made from config.json alone passes `validate`, on a machine without the weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from phasewise.cluster import cli
from phasewise.configs.load import load_file
from phasewise.configs.schema import ClusterConfig

from .plan_problems import CONFIGS, QUICK, few_shapes

MODELS = ("llama-3.1-8b", "llama-3.1-70b", "qwen3-32b", "mixtral-8x7b")


def planned(name: str, out: Path, *overrides: str) -> int:
    words = [w for key in (*QUICK, *few_shapes(name), *overrides) for w in ("--set", key)]
    return cli.main(["plan", str(CONFIGS / f"plan-{name}.yaml"), "-o", str(out), "--json", *words])


@pytest.mark.slow
@pytest.mark.parametrize("gpu", ["h100", "h200"])
@pytest.mark.parametrize("model", MODELS)
def test_a_plan_from_config_json_alone_is_valid_and_says_what_was_verified(
    model: str, gpu: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "cluster.yaml"
    apart = ("search.colocated=false",) if gpu == "h200" else ()  # so that both kinds are written
    assert planned(f"{model}-{gpu}", out, *apart) == 0
    verified = json.loads(capsys.readouterr().out)["best"]
    assert cli.main(["validate", str(out), "--without-weights"]) == 0
    capsys.readouterr()
    for elsewhere in ([], ["--set", "model.path=/models/elsewhere"]):
        assert cli.main(["validate", str(out), *elsewhere]) == 2, "these are no weights to serve"
        assert "--without-weights" in capsys.readouterr().err
    cluster = load_file(ClusterConfig, out)
    pools = {pool["role"]: pool for pool in verified["pools"]}
    for role, pool in (("prefill", cluster.prefill), ("decode", cluster.decode)):
        if role not in pools:
            assert pool.replicas == 0
            continue
        for key in ("replicas", "tensor_parallel", "pipeline_parallel"):
            assert getattr(pool, key) == pools[role][key]


def test_phases_that_are_split_differently_are_valid(tmp_path: Path) -> None:
    """Prefill and decode with tensor and pipeline parallelism of their own."""
    out = tmp_path / "cluster.yaml"
    assert planned("llama-3.1-70b-h100", out, "search.colocated=false") == 0
    folder = CONFIGS / "models" / "llama-3.1-70b"
    splits = ["prefill.tensor_parallel=4", "decode.tensor_parallel=2", "decode.pipeline_parallel=2"]
    words = [word for key in (f"model.path={folder}", *splits) for word in ("--set", key)]
    assert cli.main(["validate", str(out), "--without-weights", *words]) == 0
    assert load_file(ClusterConfig, out).prefill.replicas > 0
