"""`phasewise calibrate`: what a running cluster spends outside steps."""

from __future__ import annotations

import argparse
import asyncio
import json
from pathlib import Path

import pytest
from phasewise.cluster.cli import EXIT_INPUT, EXIT_OK, EXIT_RUNTIME, main
from phasewise.cluster.commands import calibrate
from phasewise.cluster.proto import phasewise_pb2 as pb
from phasewise.configs.errors import InvalidConfig
from phasewise.configs.load import load_cluster
from phasewise.configs.schema import PacedConfig
from phasewise.engine.errors import Unavailable
from phasewise.placement.simulation.calibration import read_calibration
from phasewise.placement.simulation.twin import twin_of
from phasewise.tests.serving.in_process import MAX_MODEL_LEN, cluster

ROOT = Path(__file__).parents[2]
TINY, LOCAL = ROOT / "models" / "tiny", ROOT / "configs" / "local.yaml"
PACED = (
    *("prefill.device=paced", "decode.device=paced", "paced.hardware=h100"),
    *("prefill.max_batch_tokens=100", f"model.max_model_len={MAX_MODEL_LEN}"),
)
LIMIT_S = 100.0


def command(address: str, output: Path, *more: str) -> list[str]:
    sets = [word for pair in PACED for word in ("--set", pair)]
    words = ["calibrate", str(LOCAL), *sets, "--address", address, "-o", str(output)]
    return [*words, "--repeats", "1", "--json", *more]


def arguments(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    calibrate.add_arguments(parser)
    return parser.parse_args(words)


@pytest.mark.slow
def test_what_was_measured_on_a_cluster_is_what_its_twin_spends(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "calibration.json"

    async def work() -> None:
        paced = PacedConfig(hardware="h100")
        async with cluster(TINY, paced=paced, max_batch_tokens=100) as running:
            words = command(running.gateway.grpc_address, output)
            code = await asyncio.to_thread(main, words)
            assert code == EXIT_OK
            assert await running.leftovers() == {}

    asyncio.run(asyncio.wait_for(work(), LIMIT_S))
    found = json.loads(capsys.readouterr().out)
    overheads = read_calibration(output).overheads
    assert found["output"] == str(output)
    assert overheads.admit_s == pytest.approx(found["overheads"]["admit_s"])
    assert 0 < overheads.admit_s + overheads.report_s < 1
    assert overheads.cores == 0, "paced workers share none"
    assert overheads.step_s == 0, "and their steps hold the host's work"


def test_the_load_is_what_the_cluster_can_hold_and_as_slow_as_its_steps() -> None:
    config = load_cluster(LOCAL, PACED)
    load = calibrate.load_for(twin_of(config, None))
    total = load.prompt_tokens + load.output_tokens
    assert total.max() <= MAX_MODEL_LEN
    assert load.arrival_s[-1] < 60
    slow = load_cluster(LOCAL, (*PACED, "paced.hardware=cpu"))
    assert calibrate.load_for(twin_of(slow, None)).arrival_s[-1] > load.arrival_s[-1]


def test_a_cluster_of_few_tokens_is_refused() -> None:
    config = load_cluster(LOCAL, (*PACED, "model.max_model_len=40"))
    with pytest.raises(InvalidConfig, match="max_model_len"):
        calibrate.load_for(twin_of(config, None))


@pytest.mark.parametrize(
    ("roles", "in_flight", "words"),
    [
        (["decode"], 0, "0 and 1 are ready"),
        (["prefill", "decode", "decode"], 0, "1 and 2 are ready"),
        (["prefill", "decode"], 3, "3 requests are in flight"),
    ],
)
def test_another_cluster_than_the_files_or_a_busy_one_is_refused(
    roles: list[str], in_flight: int, words: str
) -> None:
    workers = [pb.WorkerStatus(role=role, state="ready") for role in roles]
    status = pb.ClusterStatus(gateway=pb.GatewayStatus(in_flight=in_flight), workers=workers)
    with pytest.raises(Unavailable, match=words):
        calibrate.check_cluster(load_cluster(LOCAL), status)


@pytest.mark.parametrize(
    ("words", "field"),
    [
        (("--repeats", "0"), "--repeats"),
        (("--cores", "2"), "--cores"),
        (("--timeout-s", "nan"), "--timeout-s"),
        (("--profile", "p.json"), "--profile"),
        (("--set", "decode.replicas=0"), "decode.replicas"),
        (("-o", "/nowhere/at/all.json"), "--output"),
    ],
)
def test_bad_input_is_named_before_anything_is_measured(
    words: tuple[str, ...], field: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command("127.0.0.1:1", tmp_path / "c.json", *words)) == EXIT_INPUT
    assert field in capsys.readouterr().err


def test_real_workers_need_a_profile(tmp_path: Path) -> None:
    args = arguments(str(LOCAL), "--address", "127.0.0.1:1", "-o", str(tmp_path / "c.json"))
    with pytest.raises(InvalidConfig, match="--profile"):
        calibrate.read_task(args)


def test_nobody_there_is_said_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command("127.0.0.1:1", tmp_path / "c.json")) == EXIT_RUNTIME
    assert "127.0.0.1:1" in capsys.readouterr().err
    assert not (tmp_path / "c.json").exists()
