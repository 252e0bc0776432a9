"""Show a running cluster: its workers with their blocks, queues and transfers, and its gateway.

Blocks are used / total; used are those of running sequences and those that a transfer may still
write to. A worker that is lost shows the reason.
"""

from __future__ import annotations

import argparse
import io
import shutil

from google.protobuf.json_format import MessageToJson
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from ..cli import EXIT_OK, check_address
from ..client import Client
from ..proto import phasewise_pb2 as pb

EXAMPLES = """\
  phasewise status --address 127.0.0.1:50051
  phasewise status --address 127.0.0.1:50051 --json
"""

CONNECT_S = 3.0
WIDTH = 140  # without a terminal
STATE_STYLES = {"ready": "green", "draining": "yellow", "lost": "red", "restarting": "yellow"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--address", metavar="HOST:PORT", required=True, help="the gateway's gRPC")
    parser.add_argument("--json", action="store_true", help="print every figure as JSON")


def run(args: argparse.Namespace) -> int:
    check_address(args.address)
    with Client(args.address) as client:
        client.wait_ready(CONNECT_S)
        status = client.status()
    print(as_json(status) if args.json else render(status))
    return EXIT_OK


def as_json(status: pb.ClusterStatus) -> str:
    """All fields under their names in phasewise.proto, zeros included."""
    return MessageToJson(
        status, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )


def render(status: pb.ClusterStatus) -> str:
    """The status as text, coloured for a terminal."""
    gateway = status.gateway
    ended = ", ".join(f"{count} {outcome}" for outcome, count in sorted(gateway.ended.items()))
    head = Text(
        f"{gateway.model} is {gateway.state}: "
        f"{gateway.in_flight}/{gateway.max_in_flight} in flight, "
        f"{gateway.output_tokens} tokens out, ended: {ended or 'none'}, "
        f"failovers {gateway.failovers}, max_model_len {gateway.max_model_len}"
    )
    return to_text(Group(head, _workers(status)))


def to_text(what: RenderableType) -> str:
    """For this terminal; plain and `WIDTH` wide where there is none."""
    shown = Console()
    width = shutil.get_terminal_size((WIDTH, 24)).columns if shown.is_terminal else WIDTH
    console = Console(file=io.StringIO(), force_terminal=shown.is_terminal, width=width)
    console.print(what)
    file = console.file
    assert isinstance(file, io.StringIO)
    return file.getvalue().rstrip("\n")


def _workers(status: pb.ClusterStatus) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("worker", "state", "device", "address", "pid"):
        table.add_column(name, no_wrap=name != "state")
    for name in ("blocks", "cached", "hits", "run", "wait", "leases", "preempted", "restarts"):
        table.add_column(name, justify="right")
    table.add_column("transfers")
    for row in status.workers:
        state = Text(row.state, style=STATE_STYLES.get(row.state, ""))
        if row.reason:
            state.append(f" ({row.reason})")
        table.add_row(
            f"{row.name}#{row.incarnation}",
            state,
            row.device,
            row.address,
            str(row.pid),
            f"{row.blocks_active + row.blocks_leased}/{row.blocks_total}",
            str(row.blocks_cached),
            f"{row.hit_tokens / row.asked_tokens:.0%}" if row.asked_tokens else "-",
            *(str(n) for n in (row.running, row.waiting, row.leases)),
            *(str(n) for n in (row.preemptions, row.restarts)),
            "; ".join(_pair(pair) for pair in row.pairs) or "-",
        )
    return table


def _pair(pair: pb.PairStatus) -> str:
    failures = f", {pair.failures} failed" if pair.failures else ""
    return f"{pair.peer} {pair.transport} {pair.bytes / 1e6:.1f} MB{failures}"
