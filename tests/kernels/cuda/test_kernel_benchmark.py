"""The GPU benchmark: every section dry here, and right where a GPU is."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from phasewise.benchmarks.gpu.bench import Bench, Target, rows_in
from phasewise.benchmarks.gpu.measure import Ceilings
from phasewise.benchmarks.gpu.sections import SECTIONS

SCRIPT = Path(__file__).parents[3] / "benchmarks" / "gpu" / "run.py"


@pytest.mark.slow
@pytest.mark.timeout(300)  # a busy machine interprets slowly
def test_a_dry_run_of_the_gpu_benchmark_reaches_the_end_of_every_section(tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    command = [sys.executable, str(SCRIPT), "--dry-run", "--json", str(file)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    rows = json.loads(file.read_text())["rows"]
    assert {row["section"] for row in rows} == {section.name for section in SECTIONS}
    assert not [row for row in rows if row.get("verdict") in ("WRONG", "failed")]
    right = [row["name"] for row in rows if row.get("verdict") == "right"]
    assert "tokens of the pair are those of one process" in right
    # What needs a device is skipped aloud, and nothing else.
    skipped = {row["name"] for row in rows if row.get("verdict") == "skipped"}
    assert skipped == {
        "copy and matrix product",
        "times",
        "capture",
        "push: kills of either side",
        "transformers, static cache, compiled",
    }


def test_a_section_that_breaks_off_leaves_its_rows_and_a_reason(tmp_path: Path) -> None:
    file = tmp_path / "rows"
    bench = Bench("decode", file, dry=False, limits=Ceilings(), budget_s=1)
    target = Target(must=6.0, good=5.0)
    for value in (4.0, 5.5, 7.0, float("nan")):
        bench.add("step", value, "ms", target, floor_ms=3.5)
    bench.check("tokens", False, at=3)
    bench.fail("out of memory")
    with file.open("a") as half:
        half.write('{"section": "deco')  # killed while it wrote
    rows = rows_in(file)
    assert [row.verdict for row in rows] == ["good", "must", "misses", "misses", "WRONG", "failed"]
    assert [row.failed for row in rows] == [False, False, False, False, True, True]
    assert rows[0].figures == {"floor_ms": 3.5}


def test_a_bandwidth_must_be_large() -> None:
    target = Target(must=3.2, good=3.8, smaller=False)
    assert [target.verdict(x) for x in (4.0, 3.5, 3.0)] == ["good", "must", "misses"]


def test_all_sections_together_take_less_than_nine_minutes() -> None:
    assert sum(section.budget_s for section in SECTIONS) < 540
    for section in SECTIONS:
        assert callable(section.load())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_kernels_and_models_are_right_on_the_device(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--only", "kernels", "models"]
    command += ["--json", str(tmp_path / "rows.json")]
    assert subprocess.run(command, timeout=200).returncode == 0
