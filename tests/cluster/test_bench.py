"""The load generator: what it sends and when, how it counts, and how it searches."""

from __future__ import annotations

import argparse
import asyncio
import json
import math
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from phasewise.cluster.cli import EXIT_INPUT, main
from phasewise.cluster.client import AsyncClient
from phasewise.cluster.commands import bench
from phasewise.cluster.gateway import Gateway, GatewaySettings
from phasewise.cluster.loadgen.goodput import Hopeless, Trial, find_goodput
from phasewise.cluster.loadgen.load import LEAD_S, Run, Sample, offer
from phasewise.cluster.loadgen.report import Report, report_of
from phasewise.cluster.loadgen.requests import requests_of
from phasewise.cluster.proto import phasewise_pb2 as pb
from phasewise.cluster.served_model import ServedModel
from phasewise.configs.errors import InvalidConfig
from phasewise.configs.schema import SloConfig
from phasewise.engine.errors import Overloaded
from phasewise.placement.workload.slo import SloPolicy, SloTargets
from phasewise.placement.workload.traces import PrefixHashes
from phasewise.placement.workload.workload import Workload
from phasewise.placement.workload.workload_file import read_workload
from phasewise.tests.serving.in_process import cluster

ROOT = Path(__file__).parents[2]
TINY = ROOT / "models" / "tiny"
LIMIT_S = 100.0
POLICY = SloPolicy(default=SloTargets(ttft_s=0.2, tpot_s=0.05, attainment=0.9), classes={})


class Time:
    """A clock that moves when somebody sleeps, for all tasks of a loop alike."""

    def __init__(self, oversleep_s: float = 0.0) -> None:
        self.now_s = 0.0
        self.oversleep_s = oversleep_s

    def __call__(self) -> float:
        return self.now_s

    async def sleep(self, seconds: float) -> None:
        self.now_s += max(seconds, 1e-6) + self.oversleep_s
        for _ in range(5):  # whoever became ready meanwhile
            await asyncio.sleep(0)


def workload_of(arrival_s: Sequence[float], **columns: Any) -> Workload:
    n = len(arrival_s)
    return Workload(
        arrival_s=np.array(arrival_s, dtype=np.float64),
        prompt_tokens=columns.pop("prompt", np.full(n, 40, np.int32)),
        output_tokens=columns.pop("output", np.full(n, 3, np.int32)),
        **columns,
    )


def messages(count: int, tokens: int = 3) -> list[pb.GenerateRequest]:
    return [pb.GenerateRequest(token_ids=[1], max_tokens=tokens) for _ in range(count)]


def run(work: Any) -> Any:
    return asyncio.run(asyncio.wait_for(work, LIMIT_S))


def streaming(time: Time, *steps_s: float) -> Any:
    """A server whose n-th token comes `steps_s[n]` of the clock after the one before."""

    async def stream(request: pb.GenerateRequest) -> AsyncIterator[pb.GenerateResponse]:
        for step_s in steps_s:
            due_s = time.now_s + step_s
            while time.now_s < due_s - 1e-9:
                await asyncio.sleep(0)
                if not time.oversleep_s:
                    time.now_s = min(due_s, time.now_s + 1e-3)
            yield pb.GenerateResponse(token_ids=[7])

    return stream


def test_latency_counts_from_the_intended_send_however_late_the_send_was() -> None:
    time = Time(oversleep_s=0.3)

    async def at_once(request: pb.GenerateRequest) -> AsyncIterator[pb.GenerateResponse]:
        yield pb.GenerateResponse(token_ids=[7, 8, 9])

    result = run(offer(at_once, messages(2), [0.0, 1.0], drain_s=1, clock=time, sleep=time.sleep))
    first, second = result.samples
    assert first.intended_s == LEAD_S
    assert second.intended_s == LEAD_S + 1.0
    assert first.lateness_s == pytest.approx(0.3, abs=0.01)
    assert first.ttft_s >= first.lateness_s
    assert second.ttft_s >= second.lateness_s > 0.29


def test_sends_never_wait_for_answers() -> None:
    async def never(request: pb.GenerateRequest) -> AsyncIterator[pb.GenerateResponse]:
        await asyncio.Event().wait()
        yield pb.GenerateResponse()

    result = run(offer(never, messages(50), [i * 0.002 for i in range(50)], drain_s=0.05))
    assert len(result.samples) == 50
    assert {sample.error for sample in result.samples} == {"Unfinished"}
    assert not any(math.isnan(sample.sent_s) for sample in result.samples)


def test_times_of_a_stream_are_taken_apart() -> None:
    time = Time()
    result = run(
        offer(
            streaming(time, 0.2, 0.1, 0.3),
            messages(1),
            [0.0],
            drain_s=5,
            clock=time,
            sleep=time.sleep,
        )
    )
    (sample,) = result.samples
    assert sample.error == ""
    assert sample.ttft_s == pytest.approx(0.2, abs=0.005)
    assert sample.tpot_s == pytest.approx(0.2, abs=0.005)
    assert sample.gaps_s == pytest.approx([0.1, 0.3], abs=0.005)


def test_failures_are_counted_by_type_and_meet_no_target() -> None:
    async def stream(request: pb.GenerateRequest) -> AsyncIterator[pb.GenerateResponse]:
        if request.max_tokens == 1:
            raise Overloaded("full", retry_after_s=1)
        yield pb.GenerateResponse(token_ids=[7] * (2 if request.max_tokens == 3 else 4))

    requests = [pb.GenerateRequest(max_tokens=n) for n in (1, 3, 4, 4)]
    workload = workload_of([0.0, 0.0, 0.0, 0.0])
    report = report_of(run(offer(stream, requests, [0.0] * 4, drain_s=1)), workload, POLICY)
    assert report.errors == {"Overloaded": 1, "Incomplete": 1}
    assert report.completed == 2
    assert report.attainment == {"default": 0.5}


def sample(ttft_s: float, tpot_s: float, **fields: Any) -> Sample:
    return Sample(
        intended_s=0.0,
        sent_s=0.0,
        first_s=ttft_s,
        last_s=ttft_s + tpot_s * 2,
        ended_s=ttft_s + tpot_s * 2,
        tokens=3,
        **fields,
    )


def test_attainment_is_joint_and_each_class_has_its_own_targets() -> None:
    policy = SloPolicy(
        default=POLICY.default, classes={"batch": SloTargets(ttft_s=10.0, tpot_s=1.0)}
    )
    samples = [sample(0.1, 0.01), sample(0.1, 0.06), sample(0.3, 0.01), sample(5.0, 0.5)]
    workload = workload_of(
        [0.0, 1.0, 2.0, 3.0],
        class_ids=np.array([0, 0, 0, 1], np.int16),
        class_names=("chat", "batch"),
    )
    result = Run(samples=samples, began_s=0.0, ended_s=10.0, cpu_s=0.1, stopped=False)
    report = report_of(result, workload, policy)
    assert report.attainment == {"chat": pytest.approx(1 / 3), "batch": 1.0}
    assert report.attainment_all == 0.5
    assert report.offered_rps == 1.0
    assert report.ttft_ms.p50 == pytest.approx(200)
    assert report.output_tokens_per_s == pytest.approx(12 / 6.0)


def test_a_late_or_busy_load_generator_is_said_to_be_one() -> None:
    late = [Sample(intended_s=0.0, sent_s=0.02, first_s=0.1, last_s=0.1, ended_s=0.1, tokens=1)]
    result = Run(samples=late, began_s=0.0, ended_s=1.0, cpu_s=0.9, stopped=False)
    warnings = report_of(result, workload_of([0.0]), POLICY).warnings
    assert len(warnings) == 2
    assert "20.0 ms" in warnings[0]
    assert "90%" in warnings[1]


def test_prompts_are_the_seeds_and_share_what_the_trace_shares() -> None:
    prefix = PrefixHashes(offsets=np.array([0, 2, 4]), ids=np.array([5, 6, 5, 9]), block_tokens=16)
    workload = workload_of([0.0, 1.0], prefix=prefix)

    def prompts(seed: int) -> list[list[int]]:
        made = requests_of(workload, POLICY, vocab_size=500, seed=seed, timeout_s=9)
        return [list(message.token_ids) for message in made]

    one, two = prompts(3)
    assert [one, two] == prompts(3)
    assert one != prompts(4)[0]
    assert len(one) == len(two) == 40
    assert one[:16] == two[:16]
    assert one[16:32] != two[16:32]
    assert max(one + two) < 500


def trial_at(limit_rps: float, rates: list[float]) -> Any:
    nothing = report_of(
        Run(samples=[sample(0.1, 0.01)], began_s=0, ended_s=1, cpu_s=0, stopped=False),
        workload_of([0.0]),
        POLICY,
    )

    async def run_trial(rate_rps: float) -> Trial:
        rates.append(rate_rps)
        return Trial(rate_rps=rate_rps, held=rate_rps <= limit_rps, stopped=False, report=nothing)

    return run_trial


@pytest.mark.parametrize("limit_rps", [0.3, 1.0, 7.7, 100.0])
def test_goodput_is_found_within_five_per_cent(limit_rps: float) -> None:
    rates: list[float] = []
    found = run(find_goodput(trial_at(limit_rps, rates), start_rps=1.0, time_left=lambda: True))
    assert found.rate_rps <= limit_rps < found.failed_rps <= found.rate_rps * 1.05
    assert not found.out_of_time
    assert len(rates) < 16


def test_a_search_ends_with_its_time_and_says_so() -> None:
    left = iter([True, True, False])
    found = run(find_goodput(trial_at(50.0, []), start_rps=1.0, time_left=lambda: next(left)))
    assert found.rate_rps == 4.0
    assert math.isinf(found.failed_rps)
    assert found.out_of_time


def test_a_trial_is_given_up_when_too_many_have_missed() -> None:
    workload = workload_of([float(i) for i in range(20)])
    hopeless = Hopeless(workload, POLICY)
    assert [hopeless(sample(0.3, 0.01)) for _ in range(3)] == [True, True, False]
    assert not hopeless(sample(0.1, 0.01))


def test_a_workload_is_a_trace_or_a_file_with_targets(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text(
        '{"arrival_s": 0, "prompt_tokens": 5, "output_tokens": 2}\n'
        '{"arrival_s": 2, "prompt_tokens": 6, "output_tokens": 3}\n'
    )
    spec, policy = read_workload(tmp_path / "t.jsonl")
    assert spec.build(0).prompt_tokens.tolist() == [5, 6]
    assert policy is None
    (tmp_path / "w.yaml").write_text(
        "workload: {trace: t.jsonl, arrivals: poisson}\nslo: {ttft_ms: 100, tpot_ms: 10}\n"
    )
    spec, policy = read_workload(tmp_path / "w.yaml", rate_rps=4.0)
    assert spec.process == "poisson"
    assert policy is not None
    assert policy.default.ttft_s == 0.1
    (tmp_path / "bad.yaml").write_text("workload: {arrivals: poison, lengths: {}}\n")
    with pytest.raises(InvalidConfig):
        read_workload(tmp_path / "bad.yaml", rate_rps=1.0)


def test_a_plan_file_is_a_workload_as_it_stands(tmp_path: Path) -> None:
    spec, policy = read_workload(ROOT / "configs" / "plan-tiny-cpu.yaml")
    assert policy is not None
    assert (spec.rate_rps, policy.default.ttft_s, policy.default.tpot_s) == (4.0, 0.5, 0.1)
    with pytest.raises(InvalidConfig, match="slo.slowdown"):
        read_workload(ROOT / "configs" / "plan-splitwise-conversation.yaml", rate_rps=4.0)
    (tmp_path / "p.yaml").write_text("workload: {lengths: {prompt: 5, output: 2}}\nmodle: {}\n")
    with pytest.raises(InvalidConfig, match="modle"):
        read_workload(tmp_path / "p.yaml", rate_rps=4.0)


def test_targets_that_nobody_gave_are_those_of_the_cluster(tmp_path: Path) -> None:
    (tmp_path / "w.yaml").write_text("workload: {lengths: {prompt: 5, output: 2}}\n")
    words = ["--address", "a:1", "--workload", str(tmp_path / "w.yaml"), "--rate", "1"]
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    settings = bench.settings_of(parser.parse_args([*words, "--slo-tpot-ms", "70"]))

    async def work() -> bench.Bench:
        slo = SloConfig(ttft_ms=432, tpot_ms=21, attainment=0.8)
        gateway = Gateway(
            ServedModel(name="m", vocab_size=9, max_model_len=64),
            GatewaySettings(grpc_address="127.0.0.1:0", slo=slo),
        )
        await gateway.start()
        try:
            async with AsyncClient(gateway.grpc_address) as client:
                return await bench.open_bench(client, settings)
        finally:
            await gateway.stop()

    assert run(work()).settings.policy.default == SloTargets(
        ttft_s=0.432, tpot_s=0.07, attainment=0.8
    )


@pytest.mark.parametrize("name", ["chat", "summarise", "write"])
def test_the_workloads_that_come_with_the_package_are_valid(name: str) -> None:
    spec, policy = read_workload(ROOT / "configs" / f"workload-{name}.yaml", rate_rps=2.0)
    assert spec.build(0).rate_rps == pytest.approx(2.0, rel=0.1)
    assert policy is not None


@pytest.mark.parametrize(
    "flags",
    [
        ("--rate", "0"),
        ("--duration", "-1"),
        ("--warm-up", "-1"),
        ("--attainment", "2"),
        ("--slo-ttft-ms", "0"),
        ("--address", "127.0.0.1:99999"),  # gRPC would take 34463 for it
        ("--address", "localhost"),
    ],
)
def test_bad_flags_are_refused(flags: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    workload = str(ROOT / "configs" / "workload-chat.yaml")
    words = ["bench", "--address", "127.0.0.1:1", "--workload", workload, "--rate", "1", *flags]
    assert main(words) == EXIT_INPUT and flags[0] in capsys.readouterr().err


def measure(running: Any, **changes: Any) -> Any:
    spec, _ = read_workload(ROOT / "configs" / "workload-chat.yaml", rate_rps=40.0)
    settings = bench.Settings(
        spec=replace(spec, max_total_tokens=60), policy=POLICY, warm_up=2, timeout_s=20
    )

    async def work() -> Any:
        async with cluster(TINY) as serving:
            opened = await bench.open_bench(
                AsyncClient(serving.gateway.grpc_address), replace(settings, **changes)
            )
            await opened.warm_up()
            return await running(opened)

    return run(work())


def test_a_real_cluster_is_measured(capsys: pytest.CaptureFixture[str]) -> None:
    async def one(opened: bench.Bench) -> Report:
        return await opened.measure(opened.settings.workload(None), title="")

    report = measure(one, num_requests=20)
    assert report.sent == report.completed == 20
    assert not report.errors
    assert report.output_tokens_per_s == pytest.approx(report.output_tokens / report.wall_s)
    assert 0 < report.ttft_ms.p50 <= report.ttft_ms.p99 <= report.e2e_ms.max
    print(bench.as_json({"itl": report.itl_ms.p50, "none": math.nan}))
    assert json.loads(capsys.readouterr().out)["none"] is None


def test_goodput_of_a_real_cluster_is_searched_and_left_idle() -> None:
    async def search(opened: bench.Bench) -> Any:
        left = iter([True, False])
        found = await find_goodput(opened.trial, start_rps=30.0, time_left=lambda: next(left))
        return found, (await opened.client.status()).gateway.in_flight

    loose = SloPolicy(default=SloTargets(ttft_s=60.0, tpot_s=60.0), classes={})
    found, in_flight = measure(search, policy=loose, duration_s=0.5)
    assert found.rate_rps == 60.0
    assert "no rate that was tried failed" in bench._goodput_text(found, loose)
    assert in_flight == 0
    tight = SloPolicy(default=SloTargets(ttft_s=1e-6, tpot_s=1e-6), classes={})
    found, in_flight = measure(search, policy=tight, duration_s=0.5)
    assert found.rate_rps == 0.0
    assert all(trial.stopped for trial in found.trials)
    assert in_flight == 0


def test_prompts_are_new_each_time_unless_they_are_asked_to_be_the_same() -> None:
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    words = ["--address", "", "--workload", str(ROOT / "configs" / "workload-chat.yaml")]

    def seed(*more: str) -> int:
        return bench.settings_of(parser.parse_args([*words, "--rate", "1", *more])).prompt_seed

    assert seed() != seed()
    assert seed("--prompt-seed", "5") == 5
