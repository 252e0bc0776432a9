"""What the chosen placement would carry if the targets or lengths were others."""

from __future__ import annotations

from dataclasses import dataclass, replace

from .algorithms import Report, Search
from .candidates import Judged
from .plan import Plan
from .problem import Problem

SCALES = (0.5, 0.8, 1.25, 2.0)


@dataclass(frozen=True, kw_only=True)
class Sensitivity:
    """Goodput of the same placement after one change, by recurrences."""

    what: str  # "TTFT target" | "TPOT target" | "prompt lengths" | "output lengths" | "share"
    change: str
    judged: Judged


def sensitivity(plan: Plan, report: Report) -> list[Sensitivity]:
    """One change at a time, a few of each kind."""
    problem = plan.problem
    cases: list[tuple[str, str, Problem, tuple[float, float]]] = []
    for scale in SCALES:
        words = f"× {scale:g}"
        cases += [
            ("TTFT target", words, problem.scaled(scale, 1.0), (1.0, 1.0)),
            ("TPOT target", words, problem.scaled(1.0, scale), (1.0, 1.0)),
            ("prompt lengths", words, problem, (scale, 1.0)),
            ("output lengths", words, problem, (1.0, scale)),
        ]
    if problem.slowdown is None:
        slo = problem.slo
        for share in sorted({0.9, 0.95, 0.99} - {slo.default.attainment}):
            stricter = replace(slo, default=replace(slo.default, attainment=share))
            cases.append(("share", f"{share:.0%}", replace(problem, slo=stricter), (1.0, 1.0)))
    found = []
    for i, (what, change, asked, lengths) in enumerate(cases):
        report("sensitivity", i / len(cases))
        search = Search(asked, lengths=lengths)
        judged = search.judge(plan.best.judged.placement)
        found.append(Sensitivity(what=what, change=change, judged=judged))
    report("sensitivity", 1.0)
    return found
