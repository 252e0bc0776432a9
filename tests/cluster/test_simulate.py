"""The command that simulates a cluster file."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
from phasewise.cluster.cli import EXIT_INPUT, EXIT_OK, main
from phasewise.cluster.commands.simulate import add_arguments, read_task
from phasewise.placement.latency.step_profile import ProfilePoint, StepProfile, write_profile

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.fixture
def chat(tmp_path: Path) -> str:
    file = tmp_path / "chat.yaml"
    file.write_text(
        "workload: {rate_rps: 3, num_requests: 200, "
        "lengths: {prompt: {mean: 100, sigma: 0.5, max: 300}, output: 20}}\n"
        "slo: {ttft_ms: 400, tpot_ms: 60}\n"
    )
    return str(file)


def simulate(*words: str) -> int:
    return main(["simulate", str(CONFIGS / "local.yaml"), *words])


def test_json_holds_latencies_attainment_and_workers(
    chat: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert simulate("--workload", chat, "--hardware", "cpu", "--seeds", "2", "--json") == EXIT_OK
    found = json.loads(capsys.readouterr().out)
    assert found["served"] == found["requests"] == 400
    assert set(found["spreads"]) >= {"ttft", "tpot", "e2e"}
    assert 0 <= found["attainment"]["default"] <= 1
    assert {worker["name"] for worker in found["workers"]} == {"prefill-0", "decode-0"}
    assert "not measured by us" in found["origin"]


def test_the_table_names_targets_and_workers(chat: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert simulate("--workload", chat, "--hardware", "cpu", "--rate", "2") == EXIT_OK
    out = capsys.readouterr().out
    assert "TTFT 400 ms" in out and "decode-0" in out and "p99" in out


def test_goodput_is_searched_on_request(chat: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--workload", chat, "--hardware", "cpu", "--seeds", "1", "--find-goodput", "--json")
    assert simulate(*words) == EXIT_OK
    rates = [one["rate_rps"] for one in json.loads(capsys.readouterr().out)["goodput"]]
    assert len(rates) == 3 and rates == sorted(rates, reverse=True)


def test_without_step_times_it_says_what_to_give(
    chat: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert simulate("--workload", chat) == EXIT_INPUT
    assert "--hardware" in capsys.readouterr().err


def test_an_unknown_sheet_is_bad_input(chat: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert simulate("--workload", chat, "--hardware", "abacus") == EXIT_INPUT
    assert "abacus" in capsys.readouterr().err


def test_a_profile_of_another_model_is_bad_input(
    chat: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    profile = tmp_path / "p.json"
    points = [
        ProfilePoint(phase=p, tp=1, pp=1, new_tokens=1, context=0, batch=b, seconds=0.01 * b)
        for p in ("prefill", "decode")
        for b in (1, 2, 4)
    ]
    other = StepProfile(hardware="h", model="other", dtype="", origin="", points=tuple(points))
    write_profile(other, profile)
    assert simulate("--workload", chat, "--profile", str(profile)) == EXIT_INPUT
    assert "'other', not 'tiny'" in capsys.readouterr().err


def test_step_times_for_a_paced_cluster_are_bad_input(chat: str) -> None:
    words = ["simulate", str(CONFIGS / "paced-4p4d.yaml"), "--workload", chat]
    assert main([*words, "--hardware", "h100"]) == EXIT_INPUT


@pytest.mark.parametrize(
    "flags", [("--rate", "0"), ("--rate", "x"), ("--requests", "-1"), ("--seeds", "1.5")]
)
def test_a_wrong_number_is_said_with_its_flag(
    chat: str, flags: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as raised:
        simulate("--workload", chat, "--hardware", "cpu", *flags)
    assert raised.value.code == EXIT_INPUT
    assert f"argument {flags[0]}: {flags[1]} is not a" in capsys.readouterr().err


def test_requests_that_are_too_long_are_left_out_and_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trace = tmp_path / "t.jsonl"
    rows = [{"arrival_s": i, "prompt_tokens": 9 + 4000 * (i % 4 == 0)} for i in range(40)]
    trace.write_text("\n".join(json.dumps({**row, "output_tokens": 5}) for row in rows))
    words = ("--workload", str(trace), "--hardware", "cpu", "--seeds", "1")
    assert simulate(*words, "--json") == EXIT_OK
    found = json.loads(capsys.readouterr().out)
    assert found["left_out_share"] == 0.25 and found["requests"] == 30
    assert simulate(*words) == EXIT_OK
    assert "25.0% of the workload's requests" in capsys.readouterr().out


def test_schedulers_go_by_the_targets_that_the_workload_names(chat: str) -> None:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    args = parser.parse_args([str(CONFIGS / "local.yaml"), "--workload", chat, "--hardware", "cpu"])
    deployment = read_task(args).deployment
    assert (deployment.ttft_ms, deployment.tpot_ms) == (400.0, 60.0)
