"""Published tables as latency sources, and how well held-out points are predicted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from phasewise.engine.errors import InvalidConfig
from phasewise.placement.latency import tables
from phasewise.placement.latency.distserve_profile import (
    DistServeLatency,
    read_distserve_profile,
    read_max_num_tokens,
)
from phasewise.placement.latency.fitting import fit_knots, medians
from phasewise.placement.latency.hardware import read_hardware
from phasewise.placement.latency.phase_latency import NoLatency, decode_features, prompt_features
from phasewise.placement.latency.roofline import all_reduce_s

DATA = Path(__file__).parent / "data"
SPLITWISE = DATA / "splitwise_perf_model.csv.gz"


def test_splitwise_rows_that_were_not_measured_are_left_out() -> None:
    profiles = tables.read_splitwise(SPLITWISE)
    assert sorted(profiles) == [
        ("bloom-176b", "a100-80gb"),
        ("bloom-176b", "h100-80gb"),
        ("llama2-70b", "a100-80gb"),
        ("llama2-70b", "h100-80gb"),
    ]


def test_splitwise_decode_batches_cost_what_was_measured() -> None:
    """Read at the number of rows, not of tokens: 64 rows take 50 ms and not 30."""
    latency = tables.read_splitwise(SPLITWISE)["llama2-70b", "h100-80gb"].phase("decode", 8)
    assert latency.total_s(decode_features(64, 576)) == pytest.approx(0.0502, rel=0.05)
    assert latency.total_s(decode_features(1, 576)) == pytest.approx(0.0298, rel=0.05)


@pytest.mark.parametrize("tp", [4, 8])
def test_splitwise_grid_points_left_out_are_predicted(tp: int) -> None:
    profile = tables.read_splitwise(SPLITWISE)["llama2-70b", "h100-80gb"]
    for phase, limit in (("prefill", 0.05), ("decode", 0.03)):
        found = [p for p in profile.points if (p.phase, p.tp) == (phase, tp)]
        grid = medians([(p.features, p.seconds) for p in found])
        errors = []
        for held in grid:
            fitted = fit_knots([point for point in grid if point != held])
            errors.append(abs(fitted.batch_s(held[0]) / held[1] - 1))
        assert np.median(errors) < limit


def test_helix_tables_are_whole_models_by_layer() -> None:
    profile = tables.read_helix(
        DATA / "helix" / "llama2_70b_a100_prompt_bs2time.csv",
        DATA / "helix" / "llama2_70b_a100_decode_bs2time.csv",
        model="llama2-70b",
        hardware="a100",
        tp=1,
        num_layers=80,
    )
    assert profile.phase("prefill").total_s(prompt_features(4000)) == pytest.approx(2.24, rel=0.03)
    assert profile.phase("decode").total_s(decode_features(200, 0)) == pytest.approx(0.24, rel=0.15)


def test_vidur_layers_shrink_with_tensor_parallelism() -> None:
    rows = tables.read_vidur_layers(DATA / "vidur_a100_llama-2-70b-hf.csv.gz")
    seconds = {row.tp: row.seconds for row in rows if row.tokens == 4096}
    assert seconds[1] > seconds[2] > seconds[4] > seconds[8] > seconds[1] / 9
    assert rows[0].shape.num_kv_heads == 8 and rows[0].shape.mlp_matrices == 3


def test_splitwises_own_test_trace_takes_what_its_simulator_says() -> None:
    """Three requests alone on a DGX-H100 with BLOOM-176B: (prompt, answer, seconds to the end)."""
    profile = tables.read_splitwise(SPLITWISE)["bloom-176b", "h100-80gb"]
    prefill, decode = profile.phase("prefill", 8), profile.phase("decode", 8)
    for prompt, output, expected_s in (
        (4096, 32, 1.744743),
        (2048, 8, 0.499255),
        (2048, 16, 0.781873),
    ):
        steps = (decode.total_s(decode_features(1, prompt + i)) for i in range(output - 1))
        found_s = prefill.total_s(prompt_features(prompt)) + sum(steps)
        assert found_s == pytest.approx(expected_s, rel=0.05)


def test_half_of_a_table_predicts_the_other_half() -> None:
    for (model, hardware), tp, limit in (
        (("bloom-176b", "h100-80gb"), 8, 0.05),
        (("llama2-70b", "h100-80gb"), 4, 0.05),
    ):
        profile = tables.read_splitwise(SPLITWISE)[model, hardware]
        points = [
            (p.features, p.seconds) for p in profile.points if (p.phase, p.tp) == ("prefill", tp)
        ]
        grid = sorted(medians(points), key=lambda point: (point[0].new_tokens, point[0].attention))
        fitted = fit_knots(grid[::2])
        errors = [abs(fitted.batch_s(f) / seconds - 1) for f, seconds in grid[1::2]]
        assert np.median(errors) < limit


def test_all_reduces_in_a_node_take_what_nccl_takes_and_across_nodes_far_more() -> None:
    rows = tables.read_vidur_collective(DATA / "vidur_all_reduce.csv.gz")
    sheet = read_hardware("a100-80g")
    for row in rows:
        if row.machine == "a100_dgx" and row.num_bytes > 2**22:
            inside = row.devices == row.a_node
            expected = all_reduce_s(row.num_bytes, row.devices, sheet)
            assert (row.seconds < 1.4 * expected) == inside


@pytest.mark.parametrize("collective", ["all_reduce", "send_recv"])
def test_collectives_are_read_as_published_a_row_a_rank(
    collective: Literal["all_reduce", "send_recv"], tmp_path: Path
) -> None:
    file = tmp_path / "h100_dgx" / f"{collective}.csv"
    file.parent.mkdir()
    head = f",time_stats.{collective}.median,rank,num_workers,size,devices_per_node\n"
    file.write_text(f"{head}0,0.010,0,2,2048,1\n1,0.014,1,2,2048,1\n2,0.020,0,2,4096,1\n")
    rows = tables.read_vidur_collective(file, collective)
    assert [(r.machine, r.devices, r.a_node, r.num_bytes) for r in rows] == [
        ("h100_dgx", 2, 1, 2048),
        ("h100_dgx", 2, 1, 4096),
    ]
    assert [row.seconds for row in rows] == pytest.approx([12e-6, 20e-6])


SPLITWISE_HEAD = (
    "model,hardware,prompt_size,batch_size,token_size,prompt_time,token_time,tensor_parallel\n"
)
VIDUR_HEAD = "num_tokens,n_embd,n_head,n_kv_head,n_expanded_embd,vocab_size,use_gated_mlp,"
VIDUR_HEAD += "num_tensor_parallel_workers,time_stats.add.median\n"
READERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "splitwise": (tables.read_splitwise, f"{SPLITWISE_HEAD}m,h100,512,1,128,60,30,8\n"),
    "layers": (tables.read_vidur_layers, f"{VIDUR_HEAD}8,64,4,4,128,99,True,1,0.5\n"),
    "collective": (
        tables.read_vidur_collective,
        "num_workers,size,devices_per_node,time_stats.all_reduce.median\n2,8,2,0.1\n",
    ),
    "attention": (
        lambda file: tables.read_vidur_attention(file, model="m", hardware="h"),
        "is_prefill,batch_size,kv_cache_size,prefill_chunk_size,num_tensor_parallel_workers,"
        "time_stats.attn_decode.median\nFalse,2,64,0,1,0.1\n",
    ),
    "helix": (
        lambda file: tables.read_helix(file, file, model="m", hardware="h", tp=1, num_layers=1),
        "0,0\n250,1\n",
    ),
}


@pytest.mark.parametrize("bom", ["", "\ufeff"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("name", READERS)
def test_a_table_with_a_broken_row_is_refused_with_its_line(
    name: str, end: str, bom: str, tmp_path: Path
) -> None:
    read, text = READERS[name]
    file = tmp_path / "t.csv"
    file.write_bytes((bom + text).replace("\n", end).encode())
    read(file)
    *_, last = text.splitlines()
    cells = last.split(",")
    for broken in ([*cells[:-1], "x"], [*cells[:-1], "-1"], cells[:-1]):
        file.write_bytes((bom + text + ",".join(broken) + "\n").replace("\n", end).encode())
        with pytest.raises(InvalidConfig, match=r"t\.csv:3: not a row"):
            read(file)


def test_a_table_without_its_columns_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "t.csv"
    file.write_text("a,b\n1,2\n")
    with pytest.raises(InvalidConfig, match="prompt_size"):
        tables.read_splitwise(file)
    with pytest.raises(InvalidConfig, match="t.csv:1"):
        tables.read_helix(file, file, model="m", hardware="h", tp=1, num_layers=1)


def test_distserve_step_times_are_its_own_formula() -> None:
    profile = read_distserve_profile(DATA / "distserve_distserve.json")
    k = profile["facebook/opt-66b", 4]
    latency = DistServeLatency(model="facebook/opt-66b", profile=profile)
    lengths = (100, 700)
    features = prompt_features(100).with_chunk(700, 0)
    for pp in (1, 2, 4):
        stage_ms = k.prefill_ms(800, sum(n * n for n in lengths), pp)
        stages = latency.phase("prefill", 4, pp).stages
        assert stages[0].batch_s(features) * 1e3 == pytest.approx(stage_ms + 2 + 0.08, rel=1e-12)
        assert all(s.batch_s(features) * 1e3 == pytest.approx(stage_ms) for s in stages[1:])
        for rows in (1, 94, 95, 200):
            step_ms = k.decode_ms(rows, rows * 301, pp) + 2 + 1e-4 * rows * 300
            first = latency.phase("decode", 4, pp).stages[0]
            assert first.batch_s(decode_features(rows, 300)) * 1e3 == pytest.approx(step_ms)


def test_a_distserve_step_of_chunks_and_rows_costs_more_than_either_alone() -> None:
    profile = read_distserve_profile(DATA / "distserve_distserve.json")
    latency = DistServeLatency(model="facebook/opt-13b", profile=profile).phase("mixed", 1)
    rows, chunk = decode_features(20, 400), prompt_features(512)
    both = rows.with_chunk(512, 0)
    assert latency.total_s(both) > max(latency.total_s(rows), latency.total_s(chunk))
    assert latency.total_s(both) < latency.total_s(rows) + latency.total_s(chunk)


def test_distserve_parallelism_that_was_not_measured_is_refused() -> None:
    profile = read_distserve_profile(DATA / "distserve_distserve.json")
    with pytest.raises(NoLatency, match=r"\[1, 2, 4\]"):
        DistServeLatency(model="facebook/opt-13b", profile=profile).phase("decode", 8)


def test_distserve_files_are_read_and_others_refused() -> None:
    assert (
        read_max_num_tokens(DATA / "distserve_max_num_tokens.csv")["facebook/opt-13b", 2, 1]
        == 163008
    )
    with pytest.raises(InvalidConfig, match="not a DistServe profile"):
        read_distserve_profile(DATA / "distserve_max_num_tokens.csv")
    with pytest.raises(InvalidConfig, match="max_num_tokens"):
        read_max_num_tokens(DATA / "distserve_distserve.json")
