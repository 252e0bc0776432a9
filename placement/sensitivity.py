"""What the chosen placement would carry if the targets or lengths were others."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from .candidates import Judged
from .plan import Plan
from .search import Search
from .slo import SloPolicy, SloTargets

SCALES = (0.5, 0.8, 1.25, 2.0)
Report = Callable[[str, float], None]


@dataclass(frozen=True, kw_only=True)
class Sensitivity:
    """Goodput of the same placement after one change, by recurrences."""

    what: str  # "TTFT target" | "TPOT target" | "prompt lengths" | "output lengths" | "share"
    change: str
    judged: Judged


def sensitivity(plan: Plan, report: Report) -> list[Sensitivity]:
    """One change at a time, a few of each kind."""
    problem = plan.problem
    slo = problem.slo.default
    cases: list[tuple[str, str, SloTargets, tuple[float, float]]] = []
    for scale in SCALES:
        words = f"× {scale:g}"
        cases += [
            ("TTFT target", words, replace(slo, ttft_s=slo.ttft_s * scale), (1.0, 1.0)),
            ("TPOT target", words, replace(slo, tpot_s=slo.tpot_s * scale), (1.0, 1.0)),
            ("prompt lengths", words, slo, (scale, 1.0)),
            ("output lengths", words, slo, (1.0, scale)),
        ]
    for share in (0.9, 0.95, 0.99):
        if share != slo.attainment:
            cases.append(("share", f"{share:.0%}", replace(slo, attainment=share), (1.0, 1.0)))
    found = []
    for i, (what, change, targets, lengths) in enumerate(cases):
        report("sensitivity", i / len(cases))
        policy = SloPolicy(default=targets, classes=problem.slo.classes)
        search = Search(replace(problem, slo=policy), lambda what, share: None, 0, lengths)
        judged = search.judge(plan.best.judged.placement)
        found.append(Sensitivity(what=what, change=change, judged=judged))
    report("sensitivity", 1.0)
    return found
