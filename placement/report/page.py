"""One self-contained HTML page about a plan: text, tables and SVG, nothing from outside."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from ..search.algorithms import Search
from ..search.candidates import Judged, Placement
from ..search.pareto import front, tradeoffs
from ..search.plan import Plan
from ..search.provision import Provision
from ..search.sensitivity import Sensitivity
from .charts import Axis, Series, bar_chart, line_chart
from .explain import explain
from .plan_file import caveats, cluster_yaml, spare_words
from .style import STYLE

RATES = (0.2, 0.4, 0.6, 0.75, 0.85, 0.95, 1.05, 1.15, 1.3, 1.5)
SCALES = (0.4, 0.6, 0.75, 0.9, 1.0, 1.2, 1.5, 2.0)


def report_html(plan: Plan, flow: Provision | None, changes: Sequence[Sensitivity]) -> str:
    """The whole page."""
    title = f"{plan.problem.model.name}: {plan.best.judged.placement}"
    charts = [
        (
            "Attainment against rate",
            _rates(plan),
            "Share of requests that meet TTFT and TPOT "
            "jointly. The dashed lines are the target share and the goodput. 3P2×1: three prefill "
            "workers of tensor parallel 2 and one pipeline stage; D decodes, C does both.",
        ),
        (
            "Attainment against SLO scale",
            _scales(plan),
            "Both targets tightened (left) or loosened (right), at the planned rate.",
        ),
        (
            "Speed for one user against throughput",
            _pareto(plan),
            "Each dot is a pair of shapes at "
            "one decode batch size, by means and without queueing; the line is the Pareto front, "
            "the dashed line the TPOT target.",
        ),
        (
            "Cost and power",
            _costs(plan),
            "Rated power and list prices of the hardware sheets, or "
            "those of the plan file, at the goodput.",
        ),
    ]
    cards = "".join(
        f"<figure><h2>{escape(name)}</h2>{svg}<figcaption>{escape(words)}</figcaption></figure>"
        for name, svg, words in charts
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body><main>"
        f"{_head(plan)}<section class='cards'>{cards}</section>{_ranking(plan)}"
        f"<section><h2>In words</h2><pre>{escape(explain(plan, flow, changes))}</pre></section>"
        f"<section><h2>Cluster file</h2><pre>{escape(cluster_yaml(plan))}</pre></section>"
        "</main></body></html>\n"
    )


def _head(plan: Plan) -> str:
    best, placement = plan.best, plan.best.judged.placement
    slo, slowdown = plan.problem.slo.default, plan.problem.slowdown
    classes = bool(plan.problem.slo.classes)
    of_class = " of the default class" * classes
    held = f"Attainment of {best.tightest}" if classes else "Attainment"
    share = plan.problem.slo.of(best.tightest).attainment
    if slowdown is not None:
        held, share = f"Within {best.tightest} slowdown", slowdown.share_of(best.tightest)
    facts = [
        (
            "Goodput",
            f"{best.judged.rate_rps:.2f}",
            "req/s",
            f"{best.judged.low_rps:.2f} to {best.judged.high_rps:.2f}",
        ),
        ("Promise", f"{plan.promised_rps(best):.2f}", "req/s", _reserve(plan)),
        ("A GPU", f"{best.judged.per_gpu:.2f}", "req/s", f"{placement.gpus} GPUs"),
        ("TTFT p90", f"{best.ttft_ms[1]:.0f}", "ms", f"target {slo.ttft_s * 1e3:.4g}{of_class}"),
        ("TPOT p90", f"{best.tpot_ms[1]:.1f}", "ms", f"target {slo.tpot_s * 1e3:.4g}{of_class}"),
        (
            held,
            f"{best.attainment:.1%}",
            "",
            f"± {best.attainment_half:.1%}, target {share:.0%}",
        ),
        ("Cost", f"{placement.cost_per_hour:.2f}", "$/h", f"{placement.power_w / 1e3:.2f} kW"),
    ]
    tiles = "".join(
        f"<div><h3>{escape(name)}</h3><p><b>{escape(value)}</b> {unit}</p>"
        f"<small>{escape(more)}</small></div>"
        for name, value, unit, more in facts
    )
    return (
        f"<header><p class='over'>placement plan · {escape(placement.kind)}</p>"
        f"<h1>{escape(plan.problem.model.name)}</h1><p class='what'>{escape(str(placement))}</p>"
        f"<p class='verdict'>{escape(plan.verdict[0].upper() + plan.verdict[1:])}.</p>"
        f"{_notes(plan)}</header>"
        f"<section class='tiles'>{tiles}</section>"
    )


def _notes(plan: Plan) -> str:
    spare = [f"with {spare_words(plan)}"] * bool(plan.best.judged.placement.spare)
    return "".join(
        f"<p class='note'>{escape(words[0].upper() + words[1:])}.</p>"
        for words in spare + caveats(plan)
    )


def _reserve(plan: Plan) -> str:
    headroom = plan.problem.config.objective.headroom
    return f"low end less {headroom:.0%}" if headroom else "low end of the interval"


def _contenders(plan: Plan) -> list[tuple[str, Judged]]:
    found = [("chosen", plan.best.judged)]
    if plan.other is not None:
        prefill = plan.other.judged.placement.prefill
        found.append(("colocated" if prefill is None else "disaggregated", plan.other.judged))
    if plan.runner_up is not None:
        found.append(("runner-up", plan.runner_up))
    if plan.compared is not None and plan.compared.judged.rate_rps > 0:
        found.append(("compared", plan.compared.judged))
    return found


def _rates(plan: Plan) -> str:
    top = max(judged.rate_rps for _, judged in _contenders(plan)) * RATES[-1]
    series = [
        Series(
            name=f"{name}: {_short(judged.placement)}",
            points=[
                (rate, plan.search.attainment(judged.placement, rate))
                for rate in (judged.rate_rps * scale for scale in RATES)
            ],
        )
        for name, judged in _contenders(plan)
    ]
    return line_chart(
        series,
        Axis(label="requests a second", low=0.0, high=top),
        Axis(label="attainment", low=0.0, high=1.0, percent=True),
        across=plan.problem.slo.default.attainment,
        down=plan.best.judged.rate_rps,
    )


def _scales(plan: Plan) -> str:
    rate_rps = plan.problem.rate_rps or plan.best.judged.rate_rps
    points: dict[str, list[tuple[float, float]]] = {}
    for scale in SCALES:
        search = Search(plan.problem.scaled(scale, scale))
        for name, judged in _contenders(plan):
            share = search.attainment(judged.placement, rate_rps)
            points.setdefault(f"{name}: {_short(judged.placement)}", []).append((scale, share))
    return line_chart(
        [Series(name=name, points=line) for name, line in points.items()],
        Axis(label="SLO scale", low=SCALES[0], high=SCALES[-1]),
        Axis(label="attainment", low=0.0, high=1.0, percent=True),
        across=plan.problem.slo.default.attainment,
        down=1.0,
    )


def _pareto(plan: Plan) -> str:
    options = tradeoffs(plan.problem, plan.search.phases)
    best = front(options)
    slow = 1 / plan.problem.slo.default.tpot_s
    return line_chart(
        [
            Series(
                name="Pareto front",
                points=[(o.user_tps, o.gpu_tps) for o in best],
                labels=[o.words for o in best],
            ),
            Series(
                name="all pairs",
                points=[(o.user_tps, o.gpu_tps) for o in options],
                labels=[o.words for o in options],
                line=False,
            ),
        ],
        Axis(
            label="output tokens a second for one user",
            low=0.0,
            high=_top(o.user_tps for o in options),
        ),
        Axis(label="output tokens a second a GPU", low=0.0, high=_top(o.gpu_tps for o in options)),
        down=slow,
    )


def _top(values: Iterable[float]) -> float:
    return max(values, default=1.0) * 1.05


def _costs(plan: Plan) -> str:
    rows = _contenders(plan)
    return bar_chart(
        [
            (
                "$ per 1,000 requests",
                [(n, 1e3 / j.per_dollar, f"{1e3 / j.per_dollar:.3f}") for n, j in rows],
            ),
            (
                "kWh per 1,000 requests",
                [(n, 1e3 / j.per_kwh, f"{1e3 / j.per_kwh:.3f}") for n, j in rows],
            ),
            (
                "$ an hour",
                [
                    (n, j.placement.cost_per_hour, f"{j.placement.cost_per_hour:.2f}")
                    for n, j in rows
                ],
            ),
        ]
    )


def _ranking(plan: Plan) -> str:
    rows = "".join(
        f"<tr><td>{escape(str(j.placement))}</td><td>{escape(j.placement.kind)}</td>"
        f"<td>{j.rate_rps:.2f}</td><td>{j.per_gpu:.3f}</td><td>{j.placement.gpus}</td>"
        f"<td>{j.placement.cost_per_hour:.2f}</td><td>{escape(j.binds or '–')}</td></tr>"
        for j in plan.ranked[:12]
    )
    return (
        "<section><h2>Ranking, by recurrences</h2><div class='scroll'><table><thead><tr>"
        "<th>placement</th><th>kind</th><th>req/s</th><th>a GPU</th><th>GPUs</th><th>$/h</th>"
        f"<th>binds</th></tr></thead><tbody>{rows}</tbody></table></div></section>"
    )


def _short(placement: Placement) -> str:
    words = []
    for role, pool in zip(("P", "D")[-len(placement.pools) :], placement.pools, strict=True):
        role = "C" if placement.prefill is None else role
        shape = pool.shape
        words.append(f"{pool.count}{role}{shape.tensor_parallel}×{shape.pipeline_parallel}")
    return " ".join(words)
