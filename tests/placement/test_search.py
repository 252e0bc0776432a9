"""Whole searches: published placements, other machines, and what cannot be."""

from __future__ import annotations

from pathlib import Path

import pytest
from phasewise.configs.load import load_plan
from phasewise.engine.errors import InvalidConfig
from phasewise.placement.report.explain import explain
from phasewise.placement.report.plan_file import heading
from phasewise.placement.search.algorithms import Search
from phasewise.placement.search.infeasible import Infeasible, check_config
from phasewise.placement.search.phase_search import PhaseSearch
from phasewise.placement.search.plan import make_plan
from phasewise.placement.search.problem import read_problem
from phasewise.placement.search.units import bundles_of

from .plan_problems import plan, problem, silent, written

APART = ("search.colocated=false",)
TWO_CLASSES = ("workload.classes.chat=1", "workload.classes.code=1")


@pytest.mark.slow
@pytest.mark.parametrize("model", ["opt-13b", "opt-66b"])
def test_distserves_published_placement_comes_out_or_ties(model: str) -> None:
    found = plan(f"{model}-sharegpt", "search.seeds=5")
    assert found.compared is not None
    assert found.tie(found.compared)
    assert found.compared.judged.placement.gpus == found.best.judged.placement.gpus


def test_wide_lengths_make_prefill_need_more_gpus_a_prompt() -> None:
    phases = PhaseSearch(problem("qwen3-32b-h200", "slo.attainment=0.95"))
    shapes = {shape.key[1:]: shape for shape in phases.problem.shapes}
    assert phases.prefill_rps(shapes[1, 1], 8) == 0.0
    assert phases.prefill_rps(shapes[4, 1], 2) > phases.prefill_rps(shapes[2, 1], 4) > 0
    fixed = ("workload.lengths.prompt=4000", "workload.lengths.output=500")
    phases = PhaseSearch(problem("qwen3-32b-h200", "slo.attainment=0.9", *fixed))
    shapes = {shape.key[1:]: shape for shape in phases.problem.shapes}
    assert phases.prefill_rps(shapes[1, 1], 8) > phases.prefill_rps(shapes[4, 1], 2)


def test_a_slow_network_keeps_kv_inside_nodes() -> None:
    narrow = problem("llama-3.1-8b-h100", "inventory.h100.network_gbps=0.5")
    best = Search(narrow, silent).run()[0]
    assert best.placement.local or best.placement.prefill is None
    bundles = bundles_of(best.placement, narrow)
    assert bundles is not None


def test_spares_stand_in_the_inventory_and_in_the_price() -> None:
    found = plan("llama-3.1-8b-h100", "objective.spare=1", "search.colocated=false")
    placement = found.best.judged.placement
    bare = sum(pool.gpus for pool in placement.pools)
    assert placement.gpus == bare + sum(pool.shape.gpus for pool in placement.pools)
    assert {b.worker for b in found.bundles} == {
        f"{role}-{i}"
        for role, pool in zip(("prefill", "decode"), placement.pools, strict=True)
        for i in range(pool.count + 1)
    }
    assert "Replicas count 1 spare worker in each pool" in heading(found)
    assert "simulated:" not in explain(found, None, [])


@pytest.mark.parametrize(
    ("overrides", "binding"),
    [
        (("slo.ttft_ms=2",), "slo.ttft_ms"),
        (("slo.tpot_ms=0.5",), "slo.tpot_ms"),
        (("workload.rate_rps=9000", "search.colocated=false"), "inventory"),
        (("objective.max_cost_per_hour=0.5",), "objective.max_cost_per_hour"),
        (("workload.rate_rps=400", "objective.max_gpus=2"), "max_gpus"),
        (("objective.max_gpus=1", "search.colocated=false"), "objective.max_gpus"),
        (("objective.max_power_w=1000", "search.colocated=false"), "objective.max_power_w"),
        (("objective.spare=9",), "objective.spare"),
        (("search.min_tensor_parallel=2", "inventory.h100.gpus_per_node=1"), "min_tensor_parallel"),
        (("kv.memory=1KiB",), "kv.memory"),
        (("kv.memory=1TiB",), "kv.memory"),
        (("model.max_model_len=9000000",), "model.max_model_len"),
        ((*APART, *TWO_CLASSES, "slo.classes.code.ttft_ms=2"), r"slo\.classes\.code\.ttft_ms"),
        ((*APART, *TWO_CLASSES, "slo.classes.code.tpot_ms=0.5"), r"slo\.classes\.code\.tpot_ms"),
    ],
)
def test_what_cannot_be_names_what_binds_and_the_nearest_that_can(
    overrides: tuple[str, ...], binding: str
) -> None:
    asked = problem("llama-3.1-8b-h100", *overrides)
    with pytest.raises(Infeasible, match=binding) as raised:
        check_config(asked)
        make_plan(asked, silent)
    assert raised.value.nearest


@pytest.mark.parametrize(
    "overrides",
    [
        ("kv.memory=1KiB", "workload.rate_rps=0.1", *APART),
        ("kv.memory=1TiB",),
        ("model.max_model_len=9000000",),
        ("slo.ttft_ms=2", "workload.rate_rps=0.1", *APART),
        ("slo.tpot_ms=0.5", "workload.rate_rps=0.1", *APART),
    ],
)
def test_the_nearest_that_is_named_can_be_met(overrides: tuple[str, ...]) -> None:
    asked = problem("llama-3.1-8b-h100", *overrides)
    with pytest.raises(Infeasible) as raised:
        make_plan(asked, silent)
    key, value = raised.value.nearest.split(",")[0].split()
    section = {"ttft_ms": "slo", "tpot_ms": "slo", "max_model_len": "model"}.get(key)
    nearer = f"{section}.{key}={value}" if section else f"{key}={value}"
    assert Search(problem("llama-3.1-8b-h100", *overrides, nearer), silent).run()


def test_kv_memory_of_the_plan_file_is_what_workers_have() -> None:
    asked = problem("llama-3.1-8b-h100", "kv.memory=4GiB")
    assert {shape.kv_tokens for shape in asked.shapes} == {4 * 2**30 // (2 * 32 * 8 * 128 * 2)}


def test_a_dtype_of_the_plan_file_is_what_weights_and_kv_are_counted_in() -> None:
    half, whole = (problem("llama-3.1-8b-h100", f"model.dtype={d}") for d in ("auto", "float32"))
    assert whole.model.num_bytes == 2 * half.model.num_bytes
    assert whole.kv_bytes_per_token == 2 * half.kv_bytes_per_token


def test_a_model_that_fits_nowhere_says_how_much_memory_it_wants() -> None:
    tight = ("search.max_tensor_parallel=1", "search.max_pipeline_parallel=1")
    with pytest.raises(Infeasible, match=r"memory binds.*141 GB of weights.*or more GPUs"):
        make_plan(problem("llama-3.1-70b-h100", *tight), silent)


@pytest.mark.parametrize(
    ("overrides", "where"),
    [
        (("latency.source=profile",), "latency.file"),
        (("objective.goal=fastest",), "objective.goal"),
        (("inventory.h100.hardware=h900",), r"inventory\.h100\.hardware.*h900"),
        (("inventory.h100.nodse=3",), "inventory.h100.nodse"),
        (("objective.max_gpus=99",), "objective.max_gpus"),
        (('search.compare="Q4"',), "search.compare"),
        (('search.compare="0P1x1 D1x1"',), "search.compare"),
        (("search.min_tensor_parallel=4",), "search.min_tensor_parallel"),
        (("slo.classes.code.ttft_ms=5",), r"slo\.classes\.code"),
        (("workload.lengths.prompt=0",), "workload.lengths.prompt"),
    ],
)
def test_bad_files_are_refused_by_key(overrides: tuple[str, ...], where: str) -> None:
    with pytest.raises(InvalidConfig, match=where):
        asked = problem("llama-3.1-8b-h100", *overrides)
        check_config(asked)
        make_plan(asked, silent)


def test_a_malformed_trace_is_named_with_its_line(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text('{"prompt_tokens": 5, "output_tokens": 5}\n{"prompt_to\n')
    path = written(
        tmp_path,
        model="{path: " + str(Path(__file__).parents[2] / "configs/models/llama-3.1-8b") + "}",
        workload="{trace: t.jsonl, arrivals: poisson, rate_rps: 2}",
        slo="{ttft_ms: 500, tpot_ms: 50}",
        inventory="{h100: {hardware: h100}}",
    )
    with pytest.raises(InvalidConfig, match=r"t\.jsonl:2"):
        read_problem(load_plan(path), tmp_path)


def test_a_profile_of_other_hardware_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidConfig, match="measured on a100"):
        problem("opt-13b-sharegpt", "inventory.a100.hardware=h100")


@pytest.mark.slow
def test_where_simulation_refutes_the_recurrences_more_is_asked_of_them() -> None:
    """Short decode memory: the first finalists promise 6 requests a second and carry less."""
    found = plan("opt-13b-sharegpt", "search.kv_transfer=true", "latency.kv_tokens=0")
    assert found.best.judged.by == "simulation" and found.best.judged.rate_rps >= 6 * 0.98
