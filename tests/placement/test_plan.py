"""The file that a plan writes: valid, the same as what was verified, and explained."""

from __future__ import annotations

import json
import signal
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import cache
from html.parser import HTMLParser
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from phasewise.cluster import cli
from phasewise.configs.load import load_plan
from phasewise.placement.report.page import report_html
from phasewise.placement.search.algorithms import Search
from phasewise.placement.search.plan import Plan
from phasewise.placement.search.problem import read_problem
from phasewise.placement.search.provision import options_of, provision

from .plan_problems import CONFIGS, FEW_SHAPES, QUICK, plan, silent

EXAMPLES = sorted(CONFIGS.glob("plan-*.yaml"))
TINY = str(CONFIGS / "plan-tiny-cpu.yaml")
# The others are planned whole: from config.json alone in test_plans_validate.py, on ShareGPT in
# test_search.py and test_units.py, Splitwise's in test_published_cases.py, the tiny one below.
OTHERS = [CONFIGS / f"plan-opt-66b-{workload}.yaml" for workload in ("humaneval", "longbench")]
PLANNED = ("-h100", "-h200", "-sharegpt", "-cpu", "splitwise-conversation")


@cache
def fewest_gpus() -> Plan:
    return plan("llama-3.1-8b-h100", "search.colocated=false", "objective.goal=gpus")


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_every_example_names_what_exists(path: Path) -> None:
    problem = read_problem(load_plan(path), CONFIGS)
    assert problem.shapes and problem.model.num_bytes > 0


def test_every_example_is_planned_somewhere() -> None:
    assert [path for path in EXAMPLES if not path.stem.endswith(PLANNED)] == OTHERS


@pytest.mark.parametrize("path", OTHERS, ids=lambda path: path.stem)
def test_every_other_example_has_a_placement(path: Path) -> None:
    problem = read_problem(load_plan(path), CONFIGS)
    assert Search(problem, silent).run()


def test_the_report_is_one_page_with_four_charts_and_nothing_from_outside() -> None:
    text = report_html(fewest_gpus(), None, [])

    class Page(HTMLParser):
        open_tags: list[str] = []
        svgs = 0

        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            assert not {"src", "href"} & {name for name, _ in attrs}
            if tag not in ("meta", "br"):
                self.open_tags.append(tag)
            self.svgs += tag == "svg"

        def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            assert not {"src", "href"} & {name for name, _ in attrs}

        def handle_endtag(self, tag: str) -> None:
            assert self.open_tags.pop() == tag

    page = Page()
    page.feed(text)
    assert page.svgs == 4 and not page.open_tags
    assert "nan" not in text.lower().split("<style>")[0]


@dataclass(frozen=True)
class Told:
    """What one command wrote."""

    folder: Path
    page: dict[str, Any]
    words: str


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Told:
    """The tiny plan, twice: once for a program, once for a reader."""
    folder = tmp_path_factory.mktemp("tiny")
    tiny = CONFIGS.parent / "models/tiny"
    asked = ("search.seeds=2", "objective.headroom=0.2", f"model.serve_path={tiny}")
    words = [word for key in asked for word in ("--set", key)]
    spoken = []
    for flags in (["--json", "-o", str(folder / "cluster.yaml")], ["--explain"]):
        with redirect_stdout(StringIO()) as out:
            assert cli.main(["plan", TINY, *flags, *words]) == 0
        spoken.append(out.getvalue())
    return Told(folder=folder, page=json.loads(spoken[0]), words=spoken[1])


def test_json_and_exit_codes_tell_a_script_all(
    told: Told, capsys: pytest.CaptureFixture[str]
) -> None:
    found = told.page
    assert found["feasible"] and found["best"]["by"] == "simulation"
    assert found["best"]["attainment"] >= 0.9 and found["bundles"]
    assert cli.main(["plan", TINY, "--json", "--set", "slo.ttft_ms=0.01"]) == 3
    refused = json.loads(capsys.readouterr().out)
    assert not refused["feasible"] and refused["binding"] == "slo.ttft_ms" and refused["nearest"]
    assert cli.main(["plan", TINY, "--set", "slo.ttft=5"]) == 2


def test_a_cpu_plan_passes_validate_as_it_is(told: Told) -> None:
    assert cli.main(["validate", str(told.folder / "cluster.yaml")]) == 0


def test_explanations_name_the_winner_the_limits_and_the_gap(told: Told) -> None:
    for words in ("verdict", "what binds", "runner-up", "gap", "TTFT target", "step times"):
        assert words in told.words


def test_the_promise_is_told_wherever_a_plan_is(told: Told) -> None:
    best = told.page["best"]
    assert told.page["headroom"] == 0.2
    assert best["promised_rps"] == pytest.approx(0.8 * best["interval_rps"][0])
    promise = f"{best['promised_rps']:.2f} req/s: the low end of the interval less 20% headroom"
    assert told.words.count(promise) == 3, "in the summary, in the reasons, in the file's heading"


def test_a_compared_placement_that_holds_no_rate_leaves_no_nan_in_json(
    capsys: pytest.CaptureFixture[str],
) -> None:
    name = str(CONFIGS / "plan-llama-3.1-8b-h100.yaml")
    asked = ("slo.ttft_ms=40", "workload.rate_rps=1", "search.compare=P1x1 D1x1", *QUICK)
    words = [
        word for key in (*asked, *FEW_SHAPES, "search.colocated=false") for word in ("--set", key)
    ]
    assert cli.main(["plan", name, "--json", *words]) == 0
    text = capsys.readouterr().out
    assert "NaN" not in text and json.loads(text)["compared"]["ttft_ms"]["p50"] is None


@pytest.mark.parametrize("flag", ["-o", "--report"])
def test_a_file_that_cannot_be_written_is_said_before_the_search(
    flag: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in (tmp_path, tmp_path / "none" / "out"):
        assert cli.main(["plan", TINY, flag, str(path)]) == 2
        told = capsys.readouterr()
        assert str(path) in told.err and not told.out


def test_ctrl_c_while_it_searches_ends_without_a_traceback_or_a_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "cluster.yaml"
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    signal.setitimer(signal.ITIMER_REAL, 0.3)
    try:
        assert cli.main(["plan", str(CONFIGS / "plan-qwen3-32b-h200.yaml"), "-o", str(out)]) == 130
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert "interrupted" in capsys.readouterr().err and not out.exists()


def test_the_mixed_program_bounds_what_the_search_found() -> None:
    found = fewest_gpus()
    options = options_of(found.search)
    gpus = {name: machine.gpus for name, machine in found.problem.machines.items()}
    flow = provision(options, gpus, found.problem.config.objective, found.problem.rate_rps)
    assert flow is not None and flow.relaxed <= flow.bound + 1e-9
