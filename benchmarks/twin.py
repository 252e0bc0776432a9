"""Twin and live: the same cluster file and requests through `simulate` and through a real cluster.

Each case is launched by `phasewise serve` on this machine; requests come from `phasewise bench`'s
generator. The twin gets step times from a profile of this machine (or, paced, from the hardware
sheet) and overheads from a calibration run of its own, never from a run that is compared. CPU
workers have one thread and a core each. What was measured is kept in --folder and not measured
again: remove a file to repeat it, or give another folder.

    python benchmarks/twin.py [--case cpu-1p1d] [--within-s 110] [--only-measure] [--json]
                              [--figure docs/twin.svg]
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from live.cases import CASES
from live.comparison import Row, compare, table
from live.figure import figure
from live.pieces import Folder, calibrate, fill
from phasewise.cluster.commands.status import to_text

FOLDER = Path(__file__).parent / "results" / "twin"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--case", choices=list(CASES), action="append", help="some only")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="of what was measured")
    parser.add_argument(
        "--within-s", type=float, default=1200.0, help="start nothing that ends later"
    )
    parser.add_argument(
        "--only-measure", action="store_true", help="compare later: that takes no idle machine"
    )
    parser.add_argument("--figure", type=Path, metavar="SVG", help="draw what there is")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    until_s = time.monotonic() + args.within_s
    args.folder.mkdir(parents=True, exist_ok=True)
    folder = Folder(path=args.folder)
    rows: list[Row] = []
    whole = True
    for name in args.case or CASES:
        case = CASES[name]
        if not fill(case, folder, until_s=until_s):
            print(f"{name}: not complete yet, run this again", file=sys.stderr)
            whole = False
        elif not args.only_measure:
            calibrate(case, folder)
            rows += compare(case, folder)
    if args.only_measure:
        return 0 if whole else 1
    if args.figure is not None and rows:
        args.figure.write_text(figure(rows), encoding="utf-8")
    report(rows, as_json=args.json)
    return 0 if rows and all(row.passed for row in rows) else 1


def report(rows: Sequence[Row], *, as_json: bool) -> None:
    if as_json:
        print(json.dumps([asdict(row) | {"passed": row.passed} for row in rows], indent=1))
    else:
        print(to_text(table(rows)))


if __name__ == "__main__":
    sys.exit(main())
