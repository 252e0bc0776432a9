"""The file that a plan writes: valid, the same as what was verified, and explained."""

from __future__ import annotations

import json
import signal
from html.parser import HTMLParser
from pathlib import Path

import pytest
from phasewise.cluster import cli
from phasewise.configs.load import load_file, load_plan
from phasewise.configs.schema import ClusterConfig
from phasewise.placement.report.page import report_html
from phasewise.placement.search.algorithms import Search
from phasewise.placement.search.problem import read_problem
from phasewise.placement.search.provision import options_of, provision

from .plan_problems import CONFIGS, FEW_SHAPES, QUICK, plan, silent

EXAMPLES = sorted(CONFIGS.glob("plan-*.yaml"))
# Those from config.json alone are planned whole in test_plans_validate.py.
OTHERS = [path for path in EXAMPLES if not path.stem.endswith(("-h100", "-h200"))]


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_every_example_names_what_exists(path: Path) -> None:
    problem = read_problem(load_plan(path), CONFIGS)
    assert problem.shapes and problem.model.num_bytes > 0


@pytest.mark.slow
@pytest.mark.parametrize("path", OTHERS, ids=lambda path: path.stem)
def test_every_other_example_has_a_placement(path: Path) -> None:
    problem = read_problem(load_plan(path), CONFIGS)
    assert Search(problem, silent).run()


def test_the_cluster_file_says_what_was_verified(tmp_path: Path) -> None:
    out = tmp_path / "cluster.yaml"
    name = str(CONFIGS / "plan-llama-3.1-8b-h100.yaml")
    quick = [word for key in (*QUICK, *FEW_SHAPES) for word in ("--set", key)]
    assert cli.main(["plan", name, "-o", str(out), *quick]) == 0
    cluster = load_file(ClusterConfig, out)
    found = plan("llama-3.1-8b-h100")
    placement = found.best.judged.placement
    assert cluster.decode.replicas == placement.decode.count
    assert cluster.decode.tensor_parallel == placement.decode.shape.tensor_parallel
    assert cluster.prefill.replicas == (placement.prefill.count if placement.prefill else 0)
    assert cluster.slo.ttft_ms == 200 and cluster.model.max_model_len == 8192


def test_the_report_is_one_page_with_four_charts_and_nothing_from_outside() -> None:
    text = report_html(plan("llama-3.1-8b-h100", "search.colocated=false"), None, [])

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


def test_json_and_exit_codes_tell_a_script_all(capsys: pytest.CaptureFixture[str]) -> None:
    name = str(CONFIGS / "plan-tiny-cpu.yaml")
    assert cli.main(["plan", name, "--json", "--set", "search.seeds=2"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["feasible"] and found["best"]["by"] == "simulation"
    assert found["best"]["attainment"] >= 0.9 and found["bundles"]
    assert cli.main(["plan", name, "--json", "--set", "slo.ttft_ms=0.01"]) == 3
    refused = json.loads(capsys.readouterr().out)
    assert not refused["feasible"] and refused["binding"] == "slo.ttft_ms" and refused["nearest"]
    assert cli.main(["plan", name, "--set", "slo.ttft=5"]) == 2


def test_a_compared_placement_that_holds_no_rate_leaves_no_nan_in_json(
    capsys: pytest.CaptureFixture[str],
) -> None:
    name = str(CONFIGS / "plan-llama-3.1-8b-h100.yaml")
    asked = ("slo.ttft_ms=30", "workload.rate_rps=1", "search.compare=P1x1 D1x1", *QUICK)
    words = [w for key in (*asked, "search.max_pipeline_parallel=1") for w in ("--set", key)]
    assert cli.main(["plan", name, "--json", *words]) == 0
    text = capsys.readouterr().out
    assert "NaN" not in text and json.loads(text)["compared"]["ttft_ms"]["p50"] is None


@pytest.mark.parametrize("flag", ["-o", "--report"])
def test_a_file_that_cannot_be_written_is_said_before_the_search(
    flag: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = str(CONFIGS / "plan-tiny-cpu.yaml")
    for path in (tmp_path, tmp_path / "none" / "out"):
        assert cli.main(["plan", name, flag, str(path)]) == 2
        told = capsys.readouterr()
        assert str(path) in told.err and not told.out


def test_ctrl_c_while_it_searches_ends_without_a_traceback_or_a_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "cluster.yaml"
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    signal.setitimer(signal.ITIMER_REAL, 0.3)
    try:
        assert cli.main(["plan", str(CONFIGS / "plan-qwen3-32b-h200.yaml"), "-o", str(out)]) == 1
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert "interrupted" in capsys.readouterr().err and not out.exists()


def test_a_cpu_plan_passes_validate_as_it_is(tmp_path: Path) -> None:
    out = tmp_path / "cluster.yaml"
    name = str(CONFIGS / "plan-tiny-cpu.yaml")
    tiny = CONFIGS.parent / "models/tiny"
    serve = ["--set", f"model.serve_path={tiny}", "--set", "search.seeds=2"]
    assert cli.main(["plan", name, "-o", str(out), *serve]) == 0
    assert cli.main(["validate", str(out)]) == 0


def test_explanations_name_the_winner_the_limits_and_the_gap(
    capsys: pytest.CaptureFixture[str],
) -> None:
    name = str(CONFIGS / "plan-tiny-cpu.yaml")
    assert cli.main(["plan", name, "--explain", "--set", "search.seeds=2"]) == 0
    text = capsys.readouterr().out
    for words in ("verdict", "what binds", "runner-up", "gap", "TTFT target", "step times"):
        assert words in text


def test_the_mixed_program_bounds_what_the_search_found() -> None:
    found = plan("llama-3.1-8b-h100", "search.colocated=false", "objective.goal=gpus")
    options = options_of(found.problem, found.search.phases)
    gpus = {name: machine.gpus for name, machine in found.problem.machines.items()}
    flow = provision(options, gpus, found.problem.config.objective, found.problem.rate_rps)
    assert flow is not None and flow.relaxed <= flow.bound + 1e-9
