"""`phasewise profile`: what it measures, in what order, and what it writes."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from phasewise.cluster.cli import EXIT_INPUT, EXIT_OK, main
from phasewise.cluster.commands.profile import fit_of
from phasewise.cluster.profiling.measure import measure
from phasewise.cluster.profiling.points import Room, Step, decode_steps, prefill_steps
from phasewise.cluster.resources import resources_here
from phasewise.engine.batch import Batch, StepOutput
from phasewise.engine.layout import KVLayout
from phasewise.engine.paced import paced_layout
from phasewise.engine.spec import ModelSpec, load_spec
from phasewise.engine.step_clock import PARTS
from phasewise.engine.step_time import StepCoefficients, StepFeatures, features_of
from phasewise.placement.latency.step_profile import ProfilePoint, StepProfile, read_profile

ROOT = Path(__file__).parents[2]
TINY = ROOT / "models" / "tiny"
LOCAL = ROOT / "configs" / "local.yaml"
ROOM = Room(max_model_len=512, max_batch_tokens=256, max_batch_size=8, pool_tokens=2048)
TRUTH = StepCoefficients(
    base_s=1e-3, new_token_s=2e-5, attention_s=1e-8, decode_row_s=1e-4, decode_context_s=3e-7
)


@dataclass
class Machine:
    """A runner on a clock of its own, whose steps take `TRUTH`'s time and more as it warms."""

    max_model_len: int = 512
    now_s: float = 0.0
    drift: float = 0.0  # of speed, a second
    batches: list[Batch] = field(default_factory=list)

    @property
    def spec(self) -> ModelSpec:
        return load_spec(TINY)

    @property
    def layout(self) -> KVLayout:
        return paced_layout(num_layers=4, num_blocks=128, block_size=16, fingerprint="")

    def run(self, batch: Batch, layer_done: object = None) -> StepOutput:
        self.batches.append(batch)
        self.now_s += TRUTH.batch_s(features_of(batch)) * (1 + self.drift * self.now_s)
        return StepOutput(token_ids=[0] * batch.num_rows)

    def begin(self, batch: Batch, layer_done: object = None, former: object = None) -> StepOutput:
        return self.run(batch, layer_done)


def all_steps(*, quick: bool = False) -> list[Step]:
    steps = prefill_steps(ROOM, quick=quick) + decode_steps(ROOM, quick=quick)
    return sorted(steps, key=lambda step: step.size)


@pytest.mark.parametrize("quick", [True, False])
def test_the_grid_spans_the_workers_limits_and_keeps_to_them(quick: bool) -> None:
    steps = all_steps(quick=quick)
    assert all(ROOM.holds(step) for step in steps)
    assert len(set(steps)) == len(steps)
    prefill = [step for step in steps if step.phase == "prefill"]
    decode = [step for step in steps if step.phase == "decode"]
    assert max(step.new_tokens for step in prefill) == 256
    assert {step.context for step in prefill if step.new_tokens == 16} >= {0, 256}
    assert max(step.batch for step in decode) == 8
    assert max(step.context for step in decode) == 511
    assert all(step.new_tokens == 1 for step in decode)


def test_batches_are_what_the_step_says_in_blocks_of_their_own() -> None:
    machine = Machine()
    step = Step(phase="decode", new_tokens=1, context=40, batch=3)
    measure(machine, [step], within_s=0.01, progress=lambda _: None, clock=lambda: machine.now_s)
    batch = machine.batches[0]
    features = features_of(batch)
    assert (features.decode_rows, features.decode_context) == (3, 120)
    blocks = [block for sequence in batch.sequences for block in sequence.blocks]
    assert len(blocks) == len(set(blocks)) == 9
    prompt = Step(phase="prefill", new_tokens=16, context=64, batch=1)
    measure(machine, [prompt], within_s=0.01, progress=lambda _: None, clock=lambda: machine.now_s)
    assert features_of(machine.batches[-1]) == (16, 16 * 72, 0, 0)


def test_a_machine_that_slows_down_bends_no_curve() -> None:
    machine = Machine(drift=0.05)
    timed, left_out = measure(
        machine, all_steps(), within_s=3.0, progress=lambda _: None, clock=lambda: machine.now_s
    )
    assert not left_out
    ratios = []
    for entry in timed:
        assert len(entry.seconds) > 3
        batch_s = TRUTH.batch_s(_features(entry.step))
        ratios.append(sorted(entry.seconds)[len(entry.seconds) // 2] / batch_s)
    assert max(ratios) / min(ratios) < 1.08


def test_time_is_kept_and_what_is_too_slow_is_said_to_be_left_out() -> None:
    machine = Machine()
    steps = all_steps()
    timed, left_out = measure(
        machine, steps, within_s=0.03, progress=lambda _: None, clock=lambda: machine.now_s
    )
    assert left_out
    assert [entry.step for entry in timed] + left_out == steps
    assert machine.now_s < 0.09


def test_the_error_told_is_of_points_that_the_fit_has_not_seen() -> None:
    points = tuple(_point(step, TRUTH.batch_s(_features(step))) for step in all_steps())
    profile = StepProfile(hardware="h", model="m", dtype="float32", origin="", points=points)
    fit = fit_of(profile, "decode")
    assert fit is not None
    assert fit.held_out_p90 < 0.01
    assert fit.coefficients["decode_row_s"] == pytest.approx(1e-4, rel=0.05)
    bent = tuple(
        _point(step, TRUTH.batch_s(_features(step)) * (1.5 if i % 7 == 3 else 1.0))
        for i, step in enumerate(all_steps())
    )
    worse = fit_of(
        StepProfile(hardware="h", model="m", dtype="float32", origin="", points=bent), "decode"
    )
    assert worse is not None
    assert worse.held_out_p90 > 0.1


def test_a_profile_of_the_tiny_model_is_written_and_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "tiny.json"
    words = ["profile", str(LOCAL), "-o", str(path), "--quick", "--within-s", "1.5", "--json"]
    limits = ["prefill.max_batch_tokens=64", "model.max_model_len=256", "kv.memory=16MiB"]
    for change in (*limits, "prefill.threads=1", "decode.threads=1"):
        words += ["--set", change]
    assert main(words) == EXIT_OK
    told = json.loads(capsys.readouterr().out)
    profile = read_profile(path)
    assert profile.model == "tiny"
    assert profile.dtype == "float32"
    assert "1 thread" in profile.hardware
    assert "measured 20" in told["origin"]
    for phase in ("prefill", "decode", "mixed"):
        assert profile.phase(phase).total_s(_features(all_steps()[0])) > 0  # pyright: ignore


def test_a_live_workers_decode_step_is_told_part_by_part(
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ["profile", str(LOCAL), "--step", "--batch", "4", "--steps", "24", "--json"]
    for change in ("kv.memory=16MiB", "prefill.threads=1", "decode.threads=1"):
        words += ["--set", change]
    assert main(words) == EXIT_OK
    told = json.loads(capsys.readouterr().out)
    assert told["rows"] > 3.5
    assert told["steps"] >= 24
    parts = told["parts_ms"]
    assert set(parts) == set(PARTS)
    assert all(ms > 0 for ms in parts.values())
    rest = sum(ms for part, ms in parts.items() if part != "model")
    assert told["overhead_ms"] == pytest.approx(rest, abs=1e-3)
    assert 0 < told["following"] < told["steps"]
    assert set(told["aside_ms"]) == {"schedule", "emit"}
    assert all(ms > 0 for ms in told["aside_ms"].values())


def test_a_batch_that_no_step_can_have_is_refused() -> None:
    assert main(["profile", str(LOCAL), "--step", "--batch", "100000"]) == EXIT_INPUT
    assert main(["profile", str(LOCAL), "--step", "--steps", "100000"]) == EXIT_INPUT
    assert main(["profile", str(LOCAL), "--step", "--batch", "0"]) == EXIT_INPUT
    assert main(["profile", str(LOCAL)]) == EXIT_INPUT


def test_two_kinds_of_workers_are_refused(tmp_path: Path) -> None:
    words = ["profile", str(LOCAL), "-o", str(tmp_path / "p.json")]
    words += ["--set", "prefill.threads=1", "--set", "decode.threads=2"]
    assert main(words) == EXIT_INPUT


def test_what_cannot_be_measured_or_written_is_refused_at_once(tmp_path: Path) -> None:
    words = ["profile", str(LOCAL), "-o"]
    assert main([*words, str(tmp_path / "no" / "p.json")]) == EXIT_INPUT
    assert main([*words, str(tmp_path)]) == EXIT_INPUT
    out = str(tmp_path / "p.json")
    assert main([*words, out, "--within-s", "0"]) == EXIT_INPUT
    paced = str(LOCAL.parent / "paced-4p4d.yaml")
    assert main(["profile", paced, "-o", out]) == EXIT_INPUT


@pytest.mark.skipif(bool(resources_here()["GPU"]), reason="for machines without a GPU")
def test_a_gpu_that_is_not_there_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["profile", str(LOCAL), "--step"]
    assert main([*words, "--set", "prefill.device=cuda", "--set", "decode.device=cuda"]) == 2
    assert "no GPU" in capsys.readouterr().err


def _point(step: Step, seconds: float) -> ProfilePoint:
    return ProfilePoint(
        phase=step.phase,
        tp=1,
        pp=1,
        new_tokens=step.new_tokens,
        context=step.context,
        batch=step.batch,
        seconds=seconds,
    )


def _features(step: Step) -> StepFeatures:
    return _point(step, 1.0).features
