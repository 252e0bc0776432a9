"""A plan for the cores at hand, from what was measured on them."""

from __future__ import annotations

from pathlib import Path

from phasewise.configs.load import load_plan
from phasewise.placement.latency.step_profile import ProfilePoint, StepProfile, write_profile
from phasewise.placement.search.problem import read_problem
from phasewise.placement.simulation.calibration import write_calibration
from phasewise.placement.simulation.deployment import Overheads

PLAN = Path(__file__).parents[2] / "configs" / "plan-tiny-cpu.yaml"


def point(phase: str, new_tokens: int, batch: int, seconds: float) -> ProfilePoint:
    return ProfilePoint(
        phase=phase, tp=1, pp=1, new_tokens=new_tokens, context=0, batch=batch, seconds=seconds
    )


def test_a_plan_for_cores_takes_any_processors_profile_and_a_calibration(tmp_path: Path) -> None:
    profile = StepProfile(
        hardware="some processor, 1 thread",
        model="tiny",
        dtype="float32",
        origin="made up",
        points=(
            *(point("prefill", tokens, 1, 0.003 + tokens / 1e4) for tokens in (16, 128, 1024)),
            *(point("decode", 1, rows, 0.002 + rows / 1e4) for rows in (1, 8, 64)),
        ),
    )
    overheads = Overheads(step_s=0.0005, cores=2, serve_s=0.001)
    write_profile(profile, tmp_path / "profile.json")
    write_calibration(overheads, "made up", tmp_path / "calibration.json")
    changes = (
        "latency.source=profile",
        f"latency.file={tmp_path / 'profile.json'}",
        f"latency.calibration={tmp_path / 'calibration.json'}",
    )
    problem = read_problem(load_plan(PLAN, changes), PLAN.parent)
    assert problem.overheads == overheads
    assert problem.shapes[0].prefill.hardware == "some processor, 1 thread"
    assert read_problem(load_plan(PLAN), PLAN.parent).overheads == Overheads()
