"""A cluster file's twin, and the calibration it may be given."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from phasewise.cluster.resources import worker_specs
from phasewise.configs.load import load_cluster
from phasewise.engine.errors import InvalidConfig
from phasewise.placement.goodput.judging import JointJudge
from phasewise.placement.latency.hardware import read_hardware
from phasewise.placement.latency.roofline import RooflineLatency
from phasewise.placement.report.twin_report import report
from phasewise.placement.simulation.calibration import read_calibration
from phasewise.placement.simulation.simulator import simulate
from phasewise.placement.simulation.twin import shape_of_cluster, twin_of
from phasewise.placement.workload.slo import SloPolicy, SloTargets

from .simulated_clusters import requests

CONFIG = {
    "model_type": "llama",
    "hidden_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "intermediate_size": 704,
    "vocab_size": 2048,
    "max_position_embeddings": 1024,
    "torch_dtype": "float32",
}


@pytest.fixture
def cluster(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    file = tmp_path / "cluster.yaml"
    file.write_text(
        f"model: {{path: {tmp_path}}}\n"
        "prefill: {replicas: 2}\n"
        "decode: {replicas: 3, max_batch_size: 32, local_prefill: never}\n"
        "kv: {block_size: 16, memory: 64MiB}\n"
        "slo: {ttft_ms: 300, tpot_ms: 40}\n"
        "gateway: {policy: round_robin, max_in_flight: 77, max_failovers: 1}\n"
        "transfer: {mode: pull}\n"
    )
    return file


def source(path: Path, *overrides: str) -> RooflineLatency:
    config = load_cluster(path, overrides)
    return RooflineLatency(shape=shape_of_cluster(config), hardware=read_hardware("cpu"))


def test_each_pool_holds_the_kv_that_its_own_key_says(cluster: Path) -> None:
    file = load_cluster(cluster, ("prefill.memory=32MiB",))
    twin = twin_of(file, source(cluster))
    prefill, decode = [{w.num_blocks for w in pool} for pool in (twin.prefill, twin.decode)]
    assert {2 * blocks for blocks in prefill} == decode
    assert {spec.kv.memory for spec in worker_specs(file, 2)} == {32 << 20, 64 << 20}


def test_the_twin_of_a_file_that_names_nodes_has_its_workers_there(cluster: Path) -> None:
    """What KV crosses the network, and what stays on a node."""
    a, b = "{prefill-0: 1, decode-0: 1}", "{prefill-1: 1, decode-1: 1, decode-2: 1}"
    file = load_cluster(cluster, ("ray.address=auto", f"ray.nodes={{a: {a}, b: {b}}}"))
    twin = twin_of(file, source(cluster))
    nodes = {worker.name: worker.node for worker in (*twin.prefill, *twin.decode)}
    first = dict.fromkeys(("prefill-0", "decode-0"), "a")
    assert nodes == first | dict.fromkeys(("prefill-1", "decode-1", "decode-2"), "b")
    alone = twin_of(load_cluster(cluster), source(cluster))
    assert {worker.node for worker in (*alone.prefill, *alone.decode)} == {""}


def test_the_twin_has_what_the_file_says(cluster: Path) -> None:
    twin = twin_of(load_cluster(cluster), source(cluster))
    assert [worker.name for worker in twin.prefill] == ["prefill-0", "prefill-1"]
    assert len(twin.decode) == 3 and twin.decode[0].max_batch_size == 32
    assert twin.kv_bytes_per_token == 2 * 4 * 4 * 32 * 4
    assert twin.decode[0].num_blocks == (64 << 20) // (16 * 4096)
    assert twin.max_model_len == 1024
    assert (twin.policy, twin.max_in_flight, twin.max_failovers) == ("round_robin", 77, 1)
    assert (twin.transfer_mode, twin.local_prefill) == ("pull", "never")
    assert (twin.ttft_ms, twin.tpot_ms) == (300.0, 40.0)
    assert twin.decode[0].latency.phase == "decode"


def test_a_colocated_twin_computes_prompts_in_decode(cluster: Path) -> None:
    overrides = ["prefill.replicas=0", "decode.local_prefill=always"]
    twin = twin_of(load_cluster(cluster, overrides), source(cluster, *overrides))
    assert not twin.prefill and twin.local_prefill == "always"
    assert twin.decode[0].latency.phase == "mixed"
    run = simulate(twin, requests(50, 5.0))
    assert run.num_served == 50


def test_dtype_sets_the_size_of_kv(cluster: Path) -> None:
    whole = twin_of(load_cluster(cluster), source(cluster))
    half = twin_of(load_cluster(cluster, ["model.dtype=bfloat16"]), source(cluster))
    assert half.kv_bytes_per_token == whole.kv_bytes_per_token / 2


def test_without_step_times_the_remedy_is_named(cluster: Path) -> None:
    with pytest.raises(InvalidConfig, match="--profile"):
        twin_of(load_cluster(cluster), None)


def test_too_little_memory_is_refused(cluster: Path) -> None:
    config = load_cluster(cluster, ["kv.memory=1MiB", "model.max_model_len=1000"])
    with pytest.raises(InvalidConfig, match="kv.memory"):
        twin_of(config, source(cluster))


def test_a_report_counts_what_the_runs_say(cluster: Path) -> None:
    twin = twin_of(load_cluster(cluster), source(cluster))
    workloads = [requests(200, 3.0, seed=seed) for seed in (0, 1)]
    runs = [simulate(twin, workload) for workload in workloads]
    targets = SloTargets(ttft_s=10.0, tpot_s=10.0)
    found = report(workloads, runs, JointJudge(policy=SloPolicy(default=targets, classes={})))
    assert found.served == found.requests == 400
    assert found.attainment == {"default": 1.0} and found.interval == (1.0, 1.0)
    assert found.goodput_rps == found.rate_rps
    spread = found.spreads["ttft"]
    assert spread.percentiles_ms[50] <= spread.percentiles_ms[90] <= spread.percentiles_ms[99]
    assert {use.name for use in found.workers} == {w.name for w in (*twin.prefill, *twin.decode)}
    assert all(0 <= use.busy_share <= 1 for use in found.workers)


def test_a_calibration_is_read_with_its_units(tmp_path: Path) -> None:
    file = tmp_path / "calibration.json"
    document = {
        "format": "phasewise-calibration/1",
        "admit_ms": 2,
        "step_ms": 0.5,
        "transfer_bytes_per_s": 1e9,
        "transfer_latency_ms": 3,
    }
    file.write_text(json.dumps(document))
    calibration = read_calibration(file)
    assert calibration.overheads.admit_s == 0.002
    assert calibration.overheads.step_s == 0.0005
    assert calibration.network is not None
    assert calibration.network.local.bytes_per_s == 1e9
    assert calibration.network.local.latency_s == 0.003


@pytest.mark.parametrize(
    ("change", "word"),
    [({"format": "other"}, "format"), ({"step_s": 1}, "step_s"), ({"step_ms": -1}, "step_ms")],
)
def test_a_wrong_calibration_is_refused_by_key(
    tmp_path: Path, change: dict[str, object], word: str
) -> None:
    file = tmp_path / "calibration.json"
    file.write_text(json.dumps({"format": "phasewise-calibration/1", **change}))
    with pytest.raises(InvalidConfig, match=word):
        read_calibration(file)
