"""Small problems that tests of planning share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from phasewise.configs.load import load_plan
from phasewise.configs.plan_schema import PlanConfig
from phasewise.placement.search.plan import Plan, make_plan
from phasewise.placement.search.problem import Problem, read_problem

CONFIGS = Path(__file__).parents[2] / "configs"
QUICK = ("search.seeds=2", "search.finalists=1")
FEW_SHAPES = ("search.max_pipeline_parallel=1", "search.max_tensor_parallel=2")
SMALL_NODES = ("inventory.h100.gpus_per_node=4",)
LARGE = ("llama-3.1-70b", "mixtral-8x7b", "qwen3-32b-h200")


def few_shapes(name: str) -> tuple[str, ...]:
    """What leaves a problem from config.json alone two shapes, and a plan a second or two."""
    if not name.startswith(LARGE):
        return FEW_SHAPES
    return (FEW_SHAPES[0], "search.min_tensor_parallel=4", "search.max_tensor_parallel=8")


def config(name: str, *overrides: str) -> PlanConfig:
    few = (*FEW_SHAPES, *SMALL_NODES) if name.startswith("llama") else ()
    return load_plan(CONFIGS / f"plan-{name}.yaml", (*QUICK, *few, *overrides))


def problem(name: str, *overrides: str) -> Problem:
    return read_problem(config(name, *overrides), CONFIGS)


def plan(name: str, *overrides: str) -> Plan:
    return make_plan(problem(name, *overrides), silent)


def silent(what: str, share: float) -> None:
    """Reports nothing."""


def written(tmp_path: Path, **sections: Any) -> Path:
    """A plan file with the given lines, by section."""
    path = tmp_path / "plan.yaml"
    path.write_text("".join(f"{name}: {text}\n" for name, text in sections.items()))
    return path
