"""The cluster file of a plan says where its workers lie."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from phasewise.cluster.bundles import check_room, groups_of
from phasewise.configs.load import load_cluster
from phasewise.placement.report.plan_file import cluster_yaml, targets_words
from phasewise.placement.search.candidates import parse_placement

from .plan_problems import plan, problem


def test_each_pool_gets_the_kv_memory_that_it_was_verified_with(tmp_path: Path) -> None:
    """Decode on two GPUs has more room than prefill on one."""
    found = plan("llama-3.1-8b-h100", "search.colocated=false", "search.seeds=2")
    placement = parse_placement("P1x1 D2x1", found.problem)
    judged = replace(found.best.judged, placement=placement)
    path = tmp_path / "cluster.yaml"
    path.write_text(cluster_yaml(replace(found, best=replace(found.best, judged=judged))))
    config = load_cluster(path)
    for pool, memory in zip(placement.pools, config.memories, strict=True):
        held = memory / found.problem.model.kv_bytes_per_token
        assert held == pytest.approx(pool.shape.kv_tokens, rel=1e-3)
    assert config.memories[1] > config.memories[0]
    assert "`phasewise calibrate`" in path.read_text(), "what the goodput leaves out is said"
    assert config.decode.local_prefill_tokens == 0, "no prompt skips the hop that was simulated"


def test_a_plan_over_two_kinds_of_gpu_names_the_kind_of_each_pool(tmp_path: Path) -> None:
    """One GPU of each kind is all that there is, so each pool gets one of them."""
    found = plan(
        "llama-3.1-8b-h100",
        "inventory.h100.gpus_per_node=1",
        "inventory.h100.nodes=1",
        "inventory.a100.hardware=a100-80g",
        "inventory.a100.gpus_per_node=1",
        "search.colocated=false",
        "workload.rate_rps=8",
    )
    path = tmp_path / "cluster.yaml"
    path.write_text(cluster_yaml(found))
    config = load_cluster(path)
    assert {config.prefill.accelerator, config.decode.accelerator} == {"H100", "A100"}
    kinds = {"prefill-0": config.prefill.accelerator, "decode-0": config.decode.accelerator}
    assert config.ray.nodes == {
        f"{kinds[worker].lower()}-0": {worker: 1} for worker in ("decode-0", "prefill-0")
    }
    has = {"GPU": 1.0, "CPU": 8.0}
    nodes = {kind: has | {f"accelerator_type:{kind}": 1.0} for kind in ("A100", "H100")}
    check_room(groups_of(config), nodes)


def test_the_heading_tells_the_targets_of_classes_too() -> None:
    shares = "workload.classes={chat: 2, batch: 1}"
    words = targets_words(problem("llama-3.1-8b-h100", shares, "slo.classes.batch={ttft_ms: 900}"))
    assert words.startswith("at 90% of requests within TTFT 200 ms and TPOT 20 ms, of class batch")
    assert words.endswith("90% within 900 and 20 ms")
