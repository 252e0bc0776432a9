"""Where means mislead: one model, one set of machines, four ways to spread and count requests.

python benchmarks/plan_example.py > docs/planner-example.md
"""

from __future__ import annotations

from pathlib import Path

from phasewise.configs.load import load_plan
from phasewise.placement.search.phase_search import PhaseSearch
from phasewise.placement.search.plan import Plan, make_plan
from phasewise.placement.search.problem import read_problem
from phasewise.placement.search.verify import Verified

FILE = Path("configs/plan-qwen3-32b-h200.yaml")
FIXED = ("workload.lengths.prompt=4000", "workload.lengths.output=500")
CASES = (
    ("fixed", 0.9, FIXED),
    ("lognormal, σ 0.8", 0.9, ()),
    ("lognormal, σ 0.8", 0.95, ()),
    ("lognormal, σ 0.8", 0.99, ()),
)
BY_MEANS = "10P1x1 3D2x1"  # what a search by means takes: fixed lengths, no arrivals


def main() -> None:
    plans = [(name, share, _plan(share, overrides)) for name, share, overrides in CASES]
    print(HEAD)
    for name, share, plan in plans:
        print(_row(name, share, plan))
    print("\n" + WHY)
    for name, share, plan in plans:
        print(_prefill(name, share, plan))
    print("\n" + TAIL)


def _plan(share: float, overrides: tuple[str, ...]) -> Plan:
    words = (
        "search.finalists=4",
        f"slo.attainment={share}",
        f'search.compare="{BY_MEANS}"',
        *overrides,
    )
    problem = read_problem(load_plan(FILE, words), FILE.resolve().parent)
    return make_plan(problem, lambda what, share: None)


def _row(name: str, share: float, plan: Plan) -> str:
    means = plan.compared
    other = plan.other
    return (
        f"| {name} | {share:.0%} | {plan.best.judged.placement} | {_rate(plan.best)} | "
        f"{plan.best.transfer_ms:.2f} ms | {_rate(means) if means else '–'} | "
        f"{_other(other)} |"
    )


def _other(found: Verified | None) -> str:
    return "none" if found is None else f"{found.judged.placement}: {_rate(found)}"


def _rate(found: Verified) -> str:
    judged = found.judged
    if judged.rate_rps <= 0:
        return "0"
    return f"{judged.rate_rps:.1f} ({judged.low_rps:.1f} to {judged.high_rps:.1f})"


def _prefill(name: str, share: float, plan: Plan) -> str:
    phases: PhaseSearch = plan.search.phases
    cells = []
    for tp in (1, 2, 4, 8):
        shape = next(s for s in plan.problem.shapes if s.key[1:] == (tp, 1))
        alone_ms = phases.prompt_costs(shape).alone_s() * 1e3
        late = float((alone_ms > plan.problem.slo.default.ttft_s * 1e3).mean())
        rate = phases.prefill_rps(shape, 8 // tp)
        cells.append(f"{late:.1%} / {rate:.1f}")
    return f"| {name} | {share:.0%} | " + " | ".join(cells) + " |"


HEAD = """# Where means mislead: Qwen3-32B on 16 H200 GPUs

4,000 prompt and 500 output tokens on the mean, TTFT 1 s, TPOT 30 ms; step times from the model's
`config.json` and the H200 sheet (its coefficients are published ones, not measured by us). A
request counts when it meets both targets. KV is charged: 262 KB a token, layer by layer, over one
400 Gb/s port a GPU. This page is the output of `python benchmarks/plan_example.py`; one row of it
is `phasewise plan configs/plan-qwen3-32b-h200.yaml --explain --set slo.attainment=0.95`.

Rates are requests a second on 16 GPUs or fewer, confirmed by simulation, with the 95% interval of
a mean over five streams of requests. "By means" is 10 prefill workers of one GPU and 3 decode
workers of two, which a search by mean lengths prefers.

| lengths | share | best placement | goodput | mean transfer | by means | best of the other kind |
|---|---|---|---|---|---|---|"""
WHY = """## The prefill tensor parallelism that flips, and why

A prompt that takes longer than the TTFT target alone is late at any rate. With fixed lengths there
is none, so the most efficient prefill is the one without communication: tensor parallel 1. With
lognormal lengths a share of prompts is too long for one GPU. Once that share exceeds what the
target leaves (10, 5, 1%), no number of such workers helps, and prefill needs more GPUs a prompt,
though each of them then does less. Below: prompts that are late alone / goodput of eight prefill
GPUs (req/s).

| lengths | share | TP1 | TP2 | TP4 | TP8 |
|---|---|---|---|---|---|"""
TAIL = """## What this does not say

Step times come from a roofline with eight coefficients; a profile of the machines at hand replaces
it (`latency: {source: profile, file: …}`). Output lengths are independent of prompt lengths here.
Rates are confirmed in steps of 5%, up or down from what recurrences find, and only four finalists
of each kind and the placement by means are simulated: one that recurrences rank lower may be
better.
"""

if __name__ == "__main__":
    main()
