"""Finds the overheads with which a twin answers a calibration load as the live cluster did.

The load (`calibration_load`) is made so that each overhead shows somewhere: single prompts of many
lengths in an idle cluster, answers that decode together, and prompts that come while others decode.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import least_squares

from .deployment import Deployment, Overheads
from .simulator import simulate
from .workload import Workload

Column = NDArray[np.float64]

REPEATS = 3
FIRST_TOKENS = 12  # of an answer to one of many prompts
TOGETHER = (4, 12, 32)  # answers that decode at once
BESIDE = (3, 10)  # answers that decode while prompts are computed
PROMPTS_BESIDE = 12
PROMPT = 48  # of answers that decode together: what matters is later
STEP = 0.1  # relative, to see where the error falls: a simulation is not smooth
PRIOR = 0.05  # error that an overhead e times the typical one counts as: some share effects
DOUBT = 0.1  # an error beyond which a request counts by its size, not its square
# Where to begin. Seconds: admit and report together, handoff, prompt; then, where steps compute,
# step, row, serve and serve_row; prompt_share. Those of `serve` are the CPU time of gateway and
# load generator on two server cores at 1, 4 and 12 rows.
TYPICAL = (2e-3, 1e-3, 1e-3, 5e-4, 2e-5, 5e-4, 1.6e-4, 0.1)
OF_STEPS = 5  # of these, at the end


@dataclass(frozen=True, kw_only=True, slots=True)
class Fitted:
    overheads: Overheads
    ttft_error: float  # median over the load's requests, relative
    tpot_error: float


def calibration_load(lengths: Sequence[int], *, answer: int, idle_s: float) -> Workload:
    """`lengths` of single prompts; `answer` tokens of what decodes together, which takes about
    `idle_s` a request of them."""
    rows: list[tuple[float, int, int]] = []
    beside = sorted(lengths)[1:6]
    at_s = 0.0
    for _ in range(REPEATS):
        for length in lengths:
            rows.append((at_s, length, FIRST_TOKENS))
            at_s += idle_s
    for count in TOGETHER:
        rows += [(at_s, PROMPT, answer)] * count
        at_s += 5 * idle_s + count * idle_s / 4
    for count in BESIDE:
        rows += [(at_s, PROMPT, 4 * answer)] * count
        at_s += idle_s
        for i in range(PROMPTS_BESIDE):
            rows.append((at_s, beside[i % len(beside)], FIRST_TOKENS))
            at_s += idle_s / 3
        at_s += 10 * idle_s
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
) -> Fitted:
    """`cores` that workers share with the gateway and the load generator; 0: their steps are
    paced, and take what the latency model says with their host work in it. Requests that were not
    answered are NaN."""
    count = len(TYPICAL) if cores else len(TYPICAL) - OF_STEPS
    counted = load.output_tokens > 1
    # Requests that come together tell one thing.
    weight = 1 / np.sqrt([np.count_nonzero(load.arrival_s == at_s) for at_s in load.arrival_s])
    weights = np.concatenate((weight, weight[counted]))

    def errors(x: Column) -> tuple[Column, Column]:
        run = simulate(twin(_overheads(x, cores)), load)
        late = np.log(run.ttft_s / ttft_s)
        slow = np.log(run.tpot_s[counted] / tpot_s[counted])
        return np.nan_to_num(late), np.nan_to_num(slow)

    found = least_squares(
        lambda x: np.concatenate((np.concatenate(errors(x)) * weights, PRIOR * np.log(x))),
        np.ones(count),
        bounds=(1e-3, 100.0),
        diff_step=STEP,
        loss="soft_l1",
        f_scale=DOUBT,
        xtol=1e-3,
        ftol=1e-4,
        max_nfev=40,
    )
    late, slow = errors(found.x)
    return Fitted(
        overheads=_overheads(found.x, cores),
        ttft_error=float(np.median(np.abs(late))),
        tpot_error=float(np.median(np.abs(slow))),
    )


def _overheads(x: Column, cores: int) -> Overheads:
    front_s, handoff_s, prompt_s, *of_steps = (x * TYPICAL[: len(x)]).tolist()
    step_s, row_s, serve_s, serve_row_s, prompt_share = of_steps or [0.0] * OF_STEPS
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
        serve_row_s=serve_row_s,
    )
