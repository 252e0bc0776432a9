"""The GPU path on one GPU in nine minutes: right, how fast, and how near to what the chip can.

    python benchmarks/gpu/run.py [--only NAME ...] [--json FILE]
    python benchmarks/gpu/run.py --dry-run     # no GPU: tiny shapes, Triton's kernels interpreted

Sections run one after the other, each in a process of its own with a limit on its time: one that
fails, hangs or breaks the device loses neither the rows it wrote nor the other sections. Weights
are random and made on the device; nothing is downloaded, and there is no Ray. Rows are kept after
every section in `benchmarks/results/` (of a dry run, only where --json says). Exit status 1 if
something was wrong or broke off; a target that was missed is reported and no error.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from phasewise.benchmarks.gpu.bench import Bench, Row, rows_in
from phasewise.benchmarks.gpu.measure import Ceilings
from phasewise.benchmarks.gpu.sections import SECTIONS, Section
from rich.console import Console
from rich.table import Table

RESULTS = Path(__file__).resolve().parents[1] / "results"
TOTAL_S = 525.0  # of all sections
_NAMES = [section.name for section in SECTIONS]


def main() -> int:
    arguments = _arguments()
    if arguments.dry_run:
        os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported, here and in children
    if arguments.inside:
        return _inside(arguments)
    chip = "none: a dry run"
    if not arguments.dry_run:
        import torch

        if not torch.cuda.is_available():
            print("no GPU here: use --dry-run", file=sys.stderr)
            return 2
        chip = torch.cuda.get_device_name()
    chosen = [section for section in SECTIONS if section.name in (arguments.only or _NAMES)]
    path = arguments.json
    if path is None and not arguments.dry_run:
        day = datetime.now(UTC).date().isoformat()
        path = RESULTS / f"gpu_{chip.replace(' ', '_')}_{day}.json"
    rows = _outside(chosen, arguments, chip, path)
    show(rows)
    if path is not None:
        print(f"rows: {path}")
    return int(any(row.failed for row in rows))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dry-run", action="store_true", help="no GPU: tiny shapes, no times")
    parser.add_argument("--only", nargs="+", choices=_NAMES, help="these sections")
    parser.add_argument("--json", type=Path, help="where rows go")
    # What a section's own process is told.
    parser.add_argument("--inside", nargs="+", choices=_NAMES, help=argparse.SUPPRESS)
    parser.add_argument("--rows", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--ceilings", type=json.loads, default={}, help=argparse.SUPPRESS)
    return parser.parse_args()


def _outside(
    chosen: list[Section], arguments: argparse.Namespace, chip: str, path: Path | None
) -> list[Row]:
    """Every section in its own process; a dry run's together in one, which starts once."""
    end_s = time.monotonic() + TOTAL_S
    groups = [chosen] if arguments.dry_run else [[section] for section in chosen]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.jsonl"
        for group in groups:
            limit_s = min(sum(section.budget_s for section in group), end_s - time.monotonic())
            _run_group(group, limit_s, file, arguments.dry_run)
            if path is not None:
                _keep(path, rows_in(file), chip)
        return rows_in(file)


def _run_group(group: list[Section], limit_s: float, file: Path, dry: bool) -> None:
    names = [section.name for section in group]
    print(f"--- {', '.join(names)} (at most {limit_s:.0f} s)", flush=True)
    limits = [row.figures for row in rows_in(file) if "copy_tb_s" in row.figures]
    known = {name: limits[0][name] for name in Ceilings.__slots__} if limits else {}
    command = [sys.executable, str(Path(__file__).resolve()), "--inside", *names]
    command += ["--rows", str(file), "--ceilings", json.dumps(known)]
    command += ["--dry-run"] * dry
    broken = Bench(names[0], file, dry=dry, limits=Ceilings(), budget_s=0)
    if limit_s < 1:
        broken.fail("no time was left of the whole run's")
        return
    process = subprocess.Popen(command, start_new_session=True)
    try:
        status = process.wait(timeout=limit_s)
        if status != 0:
            broken.fail(f"its process ended with status {status}")
    except subprocess.TimeoutExpired:
        broken.fail(f"took longer than {limit_s:.0f} s")
    finally:  # and whatever it started
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _inside(arguments: argparse.Namespace) -> int:
    """Run sections here, each to its end or its failure."""
    import torch

    limits = Ceilings(**arguments.ceilings)
    for section in SECTIONS:
        if section.name not in arguments.inside:
            continue
        torch.manual_seed(0)
        bench = Bench(
            section.name,
            arguments.rows,
            dry=arguments.dry_run,
            limits=limits,
            budget_s=section.budget_s,
        )
        begin = time.monotonic()
        try:
            section.load()(bench)
        except Exception as error:  # whatever it was is this section's row, and the others go on
            traceback.print_exc()
            bench.fail(f"{type(error).__name__}: {error}".splitlines()[0])
        print(f"    {section.name}: {time.monotonic() - begin:.1f} s", flush=True)
    return 0


def _keep(path: Path, rows: list[Row], chip: str) -> None:
    import torch

    path.parent.mkdir(parents=True, exist_ok=True)
    kept: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "chip": chip,
        "command": " ".join(["python", *sys.argv]),
        "torch": torch.__version__,
        "rows": [json.loads(row.as_json()) for row in rows],
    }
    path.write_text(json.dumps(kept, indent=1) + "\n")


def show(rows: list[Row]) -> None:
    """Every figure with its targets, and what was wrong; then the count of verdicts."""
    table = Table(title="GPU benchmark")
    for name in ("section", "what", "figure", "floor", "must", "good", "verdict"):
        table.add_column(name, justify="right" if name in ("figure", "must", "good") else "left")
    for row in rows:
        floor = row.figures.get("floor_ms")
        table.add_row(
            row.section,
            row.name,
            "" if row.value is None else f"{row.value:.4g} {row.unit}",
            "" if floor is None else f"{floor:.3g} ms",
            "" if row.must is None else f"{row.must:g}",
            "" if row.good is None else f"{row.good:g}",
            row.verdict if not row.failed else f"{row.verdict}: {_why(row)}",
        )
    Console(width=None if sys.stdout.isatty() else 160).print(table)
    verdicts = sorted({row.verdict for row in rows if row.verdict})
    print(", ".join(f"{v}: {sum(row.verdict == v for row in rows)}" for v in verdicts))


def _why(row: Row) -> str:
    return str(row.figures.get("reason", row.figures))


if __name__ == "__main__":
    sys.exit(main())
