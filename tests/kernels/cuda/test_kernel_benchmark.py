"""The benchmark's cases: dry here, and against float64 where a GPU is."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[3] / "benchmarks" / "gpu" / "kernels.py"


def test_the_dry_run_of_the_kernel_benchmark_finds_every_kernel_right() -> None:
    command = [sys.executable, str(SCRIPT), "--dry-run"]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "right True" in ran.stdout
    assert "right False" not in ran.stdout


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_every_kernel_is_right_on_the_device() -> None:
    from phasewise.benchmarks.gpu import kernel_cases as cases
    from phasewise.benchmarks.gpu.kernels import check

    on = cases.Device(device=torch.device("cuda"), dtype=torch.bfloat16, multiprocessors=132)
    rows = list(check(cases.checked_cases(on, cases.CHECKED)))
    assert not [row for row in rows if not row["right"]]
