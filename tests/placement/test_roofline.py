"""Step times from a shape and a sheet, against published ones."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from phasewise.engine.errors import InvalidConfig
from phasewise.engine.step_time import StepFeatures
from phasewise.placement.latency.hardware import PAPER, SHEETS, hardware_names, read_hardware
from phasewise.placement.latency.model_shape import ModelShape, shape_of
from phasewise.placement.latency.phase_latency import NoLatency, decode_features, prompt_features
from phasewise.placement.latency.roofline import RooflineLatency, all_reduce_s

LLAMA_8B = shape_of(
    {
        "model_type": "llama",
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "intermediate_size": 14336,
        "vocab_size": 128256,
        "torch_dtype": "bfloat16",
    },
    name="llama-3.1-8b",
)
MIXTRAL = replace(
    LLAMA_8B,
    name="mixtral-8x7b",
    vocab=32000,
    experts=8,
    experts_per_token=2,
    expert_intermediate=14336,
    moe_layers=32,
)
# vLLM's times of Llama-3.1-8B on one H200, as NVIDIA's kernel database implies; no host time.
H200_VLLM_MS = [
    (decode_features(1, 2048), 4.91),
    (decode_features(64, 2048), 9.47),
    (decode_features(256, 2048), 23.6),
    (prompt_features(2048), 43.4),
    (prompt_features(8192), 199.0),
]


def test_sheets_of_all_hardware_state_every_origin() -> None:
    names = hardware_names()
    assert {"a100-40g", "a100-80g", "b200", "cpu", "h100", "h200", "l40s", "mi300x"} <= set(names)
    for name in names:
        sheet = read_hardware(name)
        assert sheet.name == name and sheet.version >= 1
        assert sheet.origin.keys() == {*PAPER, "coefficients"}
        assert sheet.measured_by_us or "not measured by us" in sheet.origin["coefficients"]


@pytest.mark.parametrize(("features", "milliseconds"), H200_VLLM_MS)
def test_h200_times_are_those_its_coefficients_were_fitted_to(
    features: StepFeatures, milliseconds: float
) -> None:
    h200 = read_hardware("h200")
    latency = RooflineLatency(shape=LLAMA_8B, hardware=h200).phase("mixed")
    host_s = h200.coefficients.step_s - 1e-4
    assert latency.total_s(features) - host_s == pytest.approx(milliseconds / 1e3, rel=0.025)


@pytest.mark.parametrize(("features", "milliseconds"), H200_VLLM_MS)
def test_coefficients_of_another_gpu_predict_the_h200_within_an_eighth(
    features: StepFeatures, milliseconds: float
) -> None:
    """The H100's stand on operator tables, the H200's times on another database."""
    h200, h100 = read_hardware("h200"), read_hardware("h100")
    carried = replace(h200, coefficients=replace(h100.coefficients, step_s=1e-4))
    latency = RooflineLatency(shape=LLAMA_8B, hardware=carried).phase("mixed")
    assert latency.total_s(features) == pytest.approx(milliseconds / 1e3, rel=0.125)


@pytest.mark.parametrize("shape", [LLAMA_8B, MIXTRAL])
@pytest.mark.parametrize("name", hardware_names())
def test_more_work_takes_longer_and_more_gpus_less(shape: ModelShape, name: str) -> None:
    source = RooflineLatency(shape=shape, hardware=read_hardware(name))
    one, four = source.phase("mixed", 1, 1), source.phase("mixed", 4, 1)
    for small, large in (
        (prompt_features(512), prompt_features(2048)),
        (decode_features(8, 512), decode_features(64, 512)),
        (decode_features(8, 512), decode_features(8, 4096)),
    ):
        assert one.total_s(small) < one.total_s(large)
    assert four.total_s(prompt_features(4096)) < one.total_s(prompt_features(4096))


def test_a_pipeline_is_no_faster_for_one_batch_and_nearly_so_many_times_as_busy() -> None:
    source = RooflineLatency(shape=LLAMA_8B, hardware=read_hardware("h100"))
    one, four = source.phase("prefill", 1, 1), source.phase("prefill", 1, 4)
    features = prompt_features(2048)
    assert four.total_s(features) == pytest.approx(one.total_s(features), rel=0.02)
    assert four.total_s(features) > one.total_s(features)
    assert four.interval_s(features) < 0.3 * one.total_s(features)


def test_a_mixture_reads_all_experts_only_when_many_tokens_choose() -> None:
    source = RooflineLatency(shape=MIXTRAL, hardware=read_hardware("h100"))
    latency = source.phase("decode")
    one, many = (latency.total_s(decode_features(rows, 1)) for rows in (1, 32))
    assert 2 < many / one < 4  # two of eight experts against all, and attention beside them


def test_kv_heads_are_read_twice_when_tensor_parallel_exceeds_them() -> None:
    source = RooflineLatency(shape=LLAMA_8B, hardware=read_hardware("h100"))
    eight, sixteen = (source.phase("decode", tp).stages[0] for tp in (8, 16))
    slope = [
        stage.batch_s(StepFeatures(decode_rows=1, decode_context=10**6))
        - stage.batch_s(StepFeatures(decode_rows=1))
        for stage in (eight, sixteen)
    ]
    assert slope[0] == pytest.approx(slope[1])


def test_a_group_that_leaves_its_domain_waits_for_the_network() -> None:
    """NCCL on two nodes of 8 A100s takes 10 times as long as in one (Vidur's profiles: 7.2 ms
    against 0.68 ms for 64 MiB); on 8 GPUs in a node the sheet is within a fifth of it."""
    sheet = read_hardware("a100-80g")
    inside = all_reduce_s(2**26, 8, sheet, 8)
    assert inside == all_reduce_s(2**26, 8, sheet) == pytest.approx(0.675e-3, rel=0.2)
    slow = replace(sheet, network_bandwidth=5.9e9)  # what its two single GPUs reach
    assert all_reduce_s(2**26, 16, slow, 8) > 4 * inside
    assert all_reduce_s(2**26, 16, slow) < 1.1 * inside


def test_a_pipeline_pays_the_network_where_it_leaves_a_domain_and_nowhere_else() -> None:
    """Four stages of two devices: in domains of eight, four and two devices."""
    sheet = replace(read_hardware("h100"), network_bandwidth=1e9)
    prompt = prompt_features(1024)
    extra_s = 1024 * 2 * LLAMA_8B.hidden * (1 / 1e9 - 1 / sheet.link_bandwidth)
    whole = RooflineLatency(shape=LLAMA_8B, hardware=sheet).phase("prefill", 2, 4)
    for domain, crossings in ((8, []), (4, [1]), (2, [0, 1, 2])):
        source = RooflineLatency(shape=LLAMA_8B, hardware=sheet, domain=domain)
        stages = source.phase("prefill", 2, 4).stages
        more = [
            a.batch_s(prompt) - b.batch_s(prompt) for a, b in zip(stages, whole.stages, strict=True)
        ]
        expected = [extra_s * (number in crossings) for number in range(4)]
        assert more == pytest.approx(expected, rel=1e-2, abs=1e-9)


def test_a_split_that_does_not_divide_is_refused() -> None:
    source = RooflineLatency(shape=LLAMA_8B, hardware=read_hardware("h100"))
    with pytest.raises(NoLatency, match="do not divide"):
        source.phase("decode", 3, 1)


def test_an_own_sheet_is_read_and_a_broken_one_named(tmp_path: Path) -> None:
    sheet = json.loads((SHEETS / "h100.json").read_text())
    own = tmp_path / "mine.json"
    own.write_text(json.dumps(sheet | {"name": "mine"}))
    assert read_hardware(str(own)).name == "mine"
    for broken, where in (
        (sheet | {"flops": {"value": 1e15}}, "flops"),
        (sheet | {"flops": {"value": -1, "origin": "x"}}, "flops"),
        (sheet | {"coefficients": {"value": {"matmul": 1}, "origin": "x"}}, "coefficients"),
    ):
        own.write_text(json.dumps(broken))
        with pytest.raises(InvalidConfig, match=where):
            read_hardware(str(own))
    with pytest.raises(InvalidConfig, match="there is no sheet"):
        read_hardware("h1000")
