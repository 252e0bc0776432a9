"""A problem under the one assumption of Splitwise's simulator that decides its ranking.

Its decode time is read off a curve fitted over prompt tokens times batch size, at the number of
requests instead (Mutinifni/splitwise-sim, performance_model.py), so that a batch costs what one row
does. With it, and all else as it is, the published ranking comes out; without it another does.
"""

from __future__ import annotations

from dataclasses import replace

from ..latency.step_profile import StepProfile
from .problem import Problem

# Its designs as published, in the words of `candidates.parse_placement`.
DESIGNS = {
    "HH": "25P8x1@h100 15D8x1@h100",
    "HA": "25P8x1@h100 26D8x1@a100",
    "AA": "45P8x1@a100 25D8x1@a100",
    "baseline H100": "40D8x1@h100",
    "baseline A100": "70D8x1@a100",
}


def with_free_batching(problem: Problem) -> Problem:
    """Every decode step takes as long as one of a single row. Of a problem whose times come from
    measured points and whose targets are slowdowns; the reference is a batch of one already."""
    flat = {}
    for shape in problem.shapes:
        assert isinstance(shape.source, StepProfile)
        flat[shape.machine.name] = one_row(shape.source)
    shapes = tuple(replace(s, source=flat[s.machine.name]) for s in problem.shapes)
    return replace(problem, shapes=shapes)


def one_row(profile: StepProfile) -> StepProfile:
    """With the decode time of one row of the same context for every batch."""
    alone = {
        (p.tp, p.context): p.seconds for p in profile.points if p.phase == "decode" and p.batch == 1
    }
    points = [
        replace(p, seconds=alone.get((p.tp, p.context), p.seconds)) if p.phase == "decode" else p
        for p in profile.points
    ]
    return replace(profile, points=tuple(points))
