"""A Ray that runs already, on more than one node: joined, used and left as it was; and a plan that
launches on it as it is."""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from phasewise.cluster import cli, processes
from phasewise.placement.latency.step_profile import ProfilePoint, StepProfile, write_profile
from phasewise.tests.placement.plan_problems import written
from phasewise.tests.serving.launched import ROOT, Launched
from transformers import AutoModelForCausalLM

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
NODES = Path(__file__).with_name("ray_of_two_nodes.py")
END_S = 120.0
RECOVER_S = 120.0
PROMPT = [5, 6, 7] * 20


@dataclass(frozen=True)
class RayNodes:
    """What runs: its address, each node's own process, and what whoever joins must have set."""

    address: str
    raylets: tuple[int, ...]
    environment: Mapping[str, str]

    def actors(self) -> list[dict[int, str]]:
        """By node, the processes of ranks there and the actor that each is."""
        return [
            {
                process.pid: title.partition("ray::")[2].partition(".")[0]
                for process in processes.descendants(raylet)
                if "ray::Placed" in (title := title_of(process.pid))
            }
            for raylet in self.raylets
        ]


def title_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:  # it has just ended
        return ""


@pytest.fixture(scope="module")
def ray_nodes() -> Iterator[RayNodes]:
    environment = {
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        # By default Ray takes a loopback address for the machine's outer one.
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    process = subprocess.Popen(
        [sys.executable, str(NODES)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=os.environ | environment,
    )
    try:
        assert process.stdout is not None
        lines = iter(process.stdout.readline, "")
        address, *raylets = next(line for line in lines if line.startswith("127.0.0.1:")).split()
        yield RayNodes(address, tuple(map(int, raylets)), environment)
    finally:
        process.communicate(timeout=END_S)


def tokens_of(launched: Launched) -> list[int]:
    with launched.client() as client:
        stream = client.generate(token_ids=PROMPT, max_tokens=8, temperature=0, ignore_eos=True)
        tokens = [token for output in stream for token in output.token_ids]
        assert {row.state for row in client.status().workers} == {"ready"}
    return tokens


def test_a_ray_of_two_nodes_is_joined_and_left_as_it_was(ray_nodes: RayNodes) -> None:
    """A worker with two threads of its own takes two CPUs, as many as a node has: they stand on
    different nodes. The plan below, which takes all CPUs too, finds the places that it leaves."""
    threads = ["prefill.threads=2", "decode.threads=2"]
    joined = [f"ray.address={ray_nodes.address}", "decode.local_prefill=never", *threads]
    launched = Launched(joined, environment=ray_nodes.environment)
    launched.wait_ready()
    assert len(tokens_of(launched)) == 8
    workers = launched.worker_pids()
    assert launched.stop() == 0, launched.error_text()
    assert not any(processes.find(pid) for pid in workers)
    refused = Launched([*joined, "decode.replicas=2"], environment=ray_nodes.environment)
    assert refused.wait() == 2
    assert "decode.replicas" in refused.error_text()


def test_more_nodes_than_ray_has_are_refused_by_what_it_has(ray_nodes: RayNodes) -> None:
    nodes = "{a: {prefill-0: 1}, b: {decode-0: 1}, c: {decode-1: 1}}"
    asked = [f"ray.address={ray_nodes.address}", "decode.replicas=2", f"ray.nodes={nodes}"]
    refused = Launched(asked, environment=ray_nodes.environment)
    assert refused.wait() == 2
    assert "ray.nodes: names 3 nodes, Ray has 2" in refused.error_text()


def planned(tmp_path: Path) -> Path:
    """The cluster file of a plan in which a worker's two stages lie on two nodes of two cores, for
    step times of such a pipeline are all that there is, and a core is a stage."""
    sizes = [("prefill", tokens, 1) for tokens in (16, 128, 1024)]
    sizes += [("decode", 1, rows) for rows in (1, 8, 64)]
    points = tuple(
        ProfilePoint(
            phase=phase, tp=1, pp=2, new_tokens=tokens, context=0, batch=rows,
            seconds=0.003 + tokens * rows / 1e4,
        )
        for phase, tokens, rows in sizes
    )  # fmt: skip
    write_profile(
        StepProfile(
            hardware="a core", model="tiny", dtype="float32", origin="made up", points=points
        ),
        tmp_path / "profile.json",
    )
    lengths = "lengths: {prompt: {mean: 60, sigma: 0.5}, output: {mean: 20, sigma: 0.5}}"
    plan = written(
        tmp_path,
        model=f"{{path: {ROOT / 'models' / 'tiny'}, dtype: float32, max_model_len: 512}}",
        workload=f"{{arrivals: poisson, {lengths}}}",
        slo="{ttft_ms: 150, tpot_ms: 50, attainment: 0.9}",
        inventory="{cores: {hardware: cpu, nodes: 2, gpus_per_node: 2, network_gbps: 1}}",
        latency="{source: profile, file: profile.json}",
        search="{affinity: low, colocated: false, max_tensor_parallel: 1, "
        "max_pipeline_parallel: 2, seeds: 2, finalists: 1, max_batch_size: 64}",
        kv="{memory: 64MiB}",
    )
    out = tmp_path / "cluster.yaml"
    assert cli.main(["plan", str(plan), "-o", str(out)]) == 0
    return out


def test_a_plan_over_two_nodes_launches_as_it_is_and_outlives_a_rank(
    ray_nodes: RayNodes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each node has a stage of prefill and the same one of decode. Rank 0 of both workers is on
    the first; a rank that dies on the other takes its worker with it, which comes back there."""
    path = planned(tmp_path)
    assert cli.main(["validate", str(path)]) == 0
    model: Any = AutoModelForCausalLM.from_pretrained(ROOT / "models" / "tiny", dtype="float32")
    ids = model.dummy_inputs["input_ids"].new_tensor([PROMPT])
    expected = model.generate(ids, max_new_tokens=8, do_sample=False, eos_token_id=None)
    expected = expected[0, len(PROMPT) :].tolist()
    joined = [f"ray.address={ray_nodes.address}", "decode.local_prefill=never"]
    joined += ["transfer.transport=tcp"]  # as between machines
    launched = Launched(joined, config=path, environment=ray_nodes.environment)
    launched.wait_ready()
    try:
        assert tokens_of(launched) == expected
        leaders, followers = sorted(ray_nodes.actors(), key=lambda on: "PlacedFollower" in str(on))
        assert set(launched.worker_pids()) == leaders.keys()
        assert list(leaders.values()) == ["PlacedWorker"] * 2
        assert list(followers.values()) == ["PlacedFollower"] * 2
        os.kill(next(iter(followers)), signal.SIGKILL)
        wait_restart(launched)
        assert tokens_of(launched) == expected
        again = sorted(ray_nodes.actors(), key=lambda on: "PlacedFollower" in str(on))
        assert [list(on.values()) for on in again] == [
            ["PlacedWorker"] * 2,
            ["PlacedFollower"] * 2,
        ]
        assert len(again[0].keys() & leaders) == len(again[1].keys() & followers) == 1
    finally:
        assert launched.stop() == 0, launched.error_text()


def wait_restart(launched: Launched) -> None:
    """Until one worker is in its second incarnation, and all are ready."""
    deadline_s = time.monotonic() + RECOVER_S
    with launched.client() as client:
        while True:
            rows = client.status().workers
            if sum(row.restarts for row in rows) and {row.state for row in rows} == {"ready"}:
                return
            assert time.monotonic() < deadline_s, rows
            time.sleep(0.1)
