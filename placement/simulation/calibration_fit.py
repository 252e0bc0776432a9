"""Finds the overheads with which a twin answers a calibration load as the live cluster did.

The load (`calibration_load`) is made so that each overhead shows somewhere: single prompts of many
lengths in an idle cluster, answers that decode together, and requests that come at random and
share the cluster, as in service.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize

from ..workload.workload import Workload
from .deployment import Deployment, Overheads
from .simulator import simulate

Column = NDArray[np.float64]

REPEATS = 2  # of single prompts
FIRST_TOKENS = 12  # of a single prompt's answer
TOGETHER = (4, 12, 32)  # answers that decode at once
PROMPT = 48  # of answers that decode together: what matters is later
MIXED = 80  # requests that come at random
SEED = 7  # of these
PRIOR = 0.05  # error that an overhead e times the typical one counts as: some share effects
DOUBT = 0.1  # an error beyond which a request counts by its size, not its square
FIRST_MOVE = 0.7  # of an overhead's logarithm: a search begins with twice the typical one
MOST_RUNS = 400  # simulations of the load
# Where to begin. Seconds: admit and report together, handoff; then, where steps compute, prompt,
# step, row and warm; prompt_share.
TYPICAL = (2e-3, 1e-3, 1e-3, 5e-4, 2e-5, 5e-4, 0.1)
OF_STEPS = 5  # of these, at the end: paced steps keep their schedule whatever the host does
# Core time of gateway and load generator: a step, and what a row and a request are of that. From
# their CPU time on two server cores at 1 to 22 rows a step.
SERVE_S, SERVED_ROW, SERVED_REQUEST = 5.5e-4, 0.28, 4.0
CROWD_SHARE = 0.2  # from their CPU time a step, two busy workers against calibration's mostly idle


@dataclass(frozen=True, kw_only=True, slots=True)
class Fitted:
    overheads: Overheads
    ttft_error: float  # median over the load's requests, relative
    tpot_error: float

    @property
    def accuracy(self) -> str:
        return f"within {self.ttft_error:.1%} of TTFT and {self.tpot_error:.1%} of TPOT (medians)"


def calibration_load(lengths: Sequence[int], *, answer: int, idle_s: float) -> Workload:
    """`lengths` of single prompts; `answer` tokens of what decodes together, which takes about
    `idle_s` a request of them."""
    rows: list[tuple[float, int, int]] = []
    at_s = 0.0
    for _ in range(REPEATS):
        for length in lengths:
            rows.append((at_s, length, FIRST_TOKENS))
            at_s += idle_s
    for count in TOGETHER:
        rows += [(at_s, PROMPT, answer)] * count
        at_s += 5 * idle_s + count * idle_s / 4
    chance = np.random.default_rng(SEED)
    shortest, longest = np.log(min(lengths)), np.log(sorted(lengths)[-2])
    for gap_s in chance.exponential(idle_s / 3, MIXED):
        prompt = round(np.exp(chance.uniform(shortest, longest)))
        rows.append((at_s, prompt, int(chance.integers(answer // 5, answer))))
        at_s += gap_s
    arrival_s, prompts, outputs = zip(*rows, strict=True)
    return Workload(
        arrival_s=np.array(arrival_s),
        prompt_tokens=np.array(prompts, np.int32),
        output_tokens=np.array(outputs, np.int32),
    )


def fit_overheads(
    twin: Callable[[Overheads], Deployment],
    load: Workload,
    ttft_s: Column,
    tpot_s: Column,
    *,
    cores: int,
    serving_s: float = 0.0,
) -> Fitted:
    """`cores` that workers share with the gateway and the load generator; 0: their steps are
    paced, and take what the latency model says with their host work in it. `serving_s` is the
    core time that gateway and load generator spent on this load; 0: as is typical. Requests that
    were not answered are NaN.

    A simulation is not smooth in its overheads (who shares a step with whom changes at once), so
    the search is one without slopes, over their logarithms.
    """
    count = len(TYPICAL) if cores else len(TYPICAL) - OF_STEPS
    several = load.output_tokens > 1
    weights = _weights(load, several)
    serve_s = 0.0
    if cores:
        serve_s = _serve_s(twin(_overheads(np.zeros(count), cores, SERVE_S)), load, serving_s)

    def errors(x: Column) -> tuple[Column, Column]:
        run = simulate(twin(_overheads(x, cores, serve_s)), load)
        late = np.log(run.ttft_s / ttft_s)
        slow = np.log(run.tpot_s[several] / tpot_s[several])
        return np.nan_to_num(late), np.nan_to_num(slow)

    def cost(x: Column) -> float:
        """Squares of small errors and sizes of large ones."""
        off = np.concatenate((np.concatenate(errors(x)) * weights, PRIOR * x))
        return float(np.sum(np.sqrt(1 + (off / DOUBT) ** 2) - 1))

    begin = np.zeros(count)
    simplex = np.vstack((begin, FIRST_MOVE * np.eye(count)))
    options = {"initial_simplex": simplex, "maxfev": MOST_RUNS, "xatol": 0.02, "fatol": 0.02}
    found = minimize(cost, begin, method="Nelder-Mead", options=options | {"adaptive": True})
    late, slow = errors(found.x)
    return Fitted(
        overheads=_overheads(found.x, cores, serve_s),
        ttft_error=float(np.median(np.abs(late))),
        tpot_error=float(np.median(np.abs(slow))),
    )


def _weights(load: Workload, several: NDArray[np.bool_]) -> Column:
    """Of each TTFT, then of each TPOT. Requests that come together tell one thing; and which of
    them shares a step with whom is chance, so their TTFT tells nothing."""
    together = np.array([np.count_nonzero(load.arrival_s == at_s) for at_s in load.arrival_s])
    return np.concatenate((together == 1, 1 / np.sqrt(together[several])))


def _serve_s(deployment: Deployment, load: Workload, serving_s: float) -> float:
    """Of the core time that serving `load` took: what one step's share of it is."""
    if not serving_s:
        return SERVE_S
    steps = sum(worker.steps for worker in simulate(deployment, load).workers)
    rows = int(load.output_tokens.sum())
    return float(serving_s) / (steps + SERVED_ROW * rows + SERVED_REQUEST * load.num_requests)


def _overheads(x: Column, cores: int, serve_s: float) -> Overheads:
    """`x`: logarithms of how many times the typical ones they are."""
    front_s, handoff_s, *of_steps = (np.exp(x) * TYPICAL[: len(x)]).tolist()
    prompt_s, step_s, row_s, warm_s, prompt_share = of_steps or [0.0] * OF_STEPS
    return Overheads(
        admit_s=front_s / 2,
        report_s=front_s / 2,
        handoff_s=handoff_s,
        step_s=step_s,
        row_s=row_s,
        prompt_s=prompt_s,
        prompt_share=prompt_share,
        cores=cores,
        serve_s=serve_s,
        serve_row_s=SERVED_ROW * serve_s,
        crowd_share=CROWD_SHARE if cores else 0.0,
        warm_s=warm_s,
    )
