"""What of a KV transfer decode waits for, push against pull, and the second token's delay.

    python benchmarks/exposed_transfer.py [--json FILE] [--lengths 512 8192] [--transport shm]

Two workers of a random 16-layer model, in processes of their own, one thread each; a prompt at a
time. *Exposed* is the time from the end of the prompt's computation (the last layer's and the
first token's) to the commit; pull exposes all of a transfer, and 1 - push / pull is the share of
that time that push hides. *Landed* is the share of a push's bytes that stood in decode's pool
before prefill told its first token. *Second token* is the time from the first token to the second;
beside it the same on one worker that does both (colocated), which has no transfer. Medians; modes
take turns; the pools have been written once before. Splitwise (ISCA '24, section 6.1) published
+16.5% for its layer-wise transfer and +64% for a serialized one.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import random
import statistics
import tempfile
import time
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from peers.random_checkpoint import Shape, write_checkpoint
from phasewise.cluster.assembly import AssembledWorker, assemble
from phasewise.cluster.spec import WorkerSpec
from phasewise.configs.schema import (
    DecodeConfig,
    KVConfig,
    ModelConfig,
    PrefillConfig,
    SloConfig,
    TransferConfig,
)
from phasewise.engine.report import Report
from phasewise.engine.request import Handoff, Request, SamplingParams, TransferAddress, WorkerId
from phasewise.kv_transfer.copier import Push
from phasewise.kv_transfer.lease import Action
from phasewise.kv_transfer.lease_receiver import ReceiverTable
from phasewise.kv_transfer.shm import ShmWriter
from rich.console import Console
from rich.table import Table

SHAPE = Shape(hidden=64, layers=16, intermediate=176, heads=1, kv_heads=1)
LENGTHS = (512, 1024, 2048, 4096, 8192)
MAX_MODEL_LEN = 8192 + 64
CHUNK = 2048  # tokens of a prefill step
POOL_BYTES = 72 << 20  # one longest prompt, and a little
ANSWER_S = 120.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One prompt length. Milliseconds but for `hidden`."""

    tokens: int
    mib: float
    prefill_ms: float
    exposed_push_ms: float
    exposed_pull_ms: float
    landed: float  # share of a push's bytes that was there before prefill told its first token
    hidden: float  # share of the transfer's time that push hides
    second_colocated_ms: float
    second_push_ms: float
    second_pull_ms: float


@dataclass(frozen=True, slots=True)
class Told:
    """A report with the time it was made, on the clock that all processes share."""

    at_s: float
    report: Report


class Worker:
    """A worker in a child process, as the parent sees it."""

    def __init__(self, spec: WorkerSpec) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(spec, theirs), daemon=True)
        process.start()
        self.address: TransferAddress = self.next()

    def do(self, method: str, *arguments: Any, **named: Any) -> None:
        self.pipe.send((method, arguments, named))

    def next(self) -> Any:
        if not self.pipe.poll(ANSWER_S):
            raise TimeoutError("a worker says nothing")
        return self.pipe.recv()

    def close(self) -> None:
        self.pipe.send(None)

    def exposed_s(self) -> float:
        """Of all transfers so far that this worker sent, until it heard of their commits."""
        self.do("exposed_s")
        return self.next()

    def landed(self) -> list[tuple[float, int]]:
        """When, and how many blocks of a layer, since the last call."""
        self.do("landed")
        return self.next()

    def until_token(self, count: int = 1) -> list[Told]:
        """Reports up to the one with the `count`-th token or a handoff."""
        told: list[Told] = []
        while count > 0:
            told.append(self.next())
            assert not told[-1].report.failed, told[-1].report.failed
            count -= len(told[-1].report.ids) + len(told[-1].report.handoffs)
        return told

    def rest(self) -> None:
        """Until the stream is over."""
        while not self.next().report.finished:
            pass


def _record_landings() -> list[tuple[float, int]]:
    """From now on, when blocks of layers stood in decode's pool, and how many: as this process
    wrote them there itself, or as a receiver counted them."""
    landed: list[tuple[float, int]] = []
    write, wrote = ShmWriter.write, ReceiverTable.wrote

    def recording_write(self: ShmWriter, push: Push, layers: range) -> None:
        write(self, push, layers)
        landed.append((time.monotonic(), len(push.source) * len(layers)))

    def recording_wrote(self: ReceiverTable, *about: Any) -> list[Action]:
        landed.append((time.monotonic(), about[5]))
        return wrote(self, *about)

    ShmWriter.write, ReceiverTable.wrote = recording_write, recording_wrote
    return landed


def _serve(spec: WorkerSpec, pipe: Connection) -> None:
    landed = _record_landings()

    async def work() -> None:
        async with assemble(spec) as assembled:
            pipe.send(assembled.address)
            tasks = [
                asyncio.create_task(assembled.worker.follow_transfers()),
                asyncio.create_task(_tell(assembled, pipe)),
            ]
            while (call := await asyncio.to_thread(pipe.recv)) is not None:
                method, arguments, named = call
                if method == "exposed_s":
                    pipe.send(sum(pair.exposed_s for pair in assembled.kv.pairs()))
                    continue
                if method == "landed":
                    pipe.send(landed.copy())
                    landed.clear()
                    continue
                getattr(assembled.worker, method)(*arguments, **named)
                assert not any(task.done() for task in tasks), "the worker's loops run"
            for task in tasks:
                task.cancel()

    asyncio.run(work())


async def _tell(assembled: AssembledWorker, pipe: Connection) -> None:
    async for report in assembled.worker.run():
        pipe.send(Told(time.monotonic(), report))


@dataclass(frozen=True, slots=True)
class Measured:
    """One request through one mode, in seconds."""

    prefill_s: float
    second_s: float
    exposed_s: float
    landed: float = 0.0  # share


class Bench:
    """Two prefill workers, one a mode, and a decode worker that also computes prompts."""

    def __init__(self, path: Path, transport: str) -> None:
        shared: dict[str, Any] = {
            "model": ModelConfig(path=path, dtype="float32", max_model_len=MAX_MODEL_LEN),
            "kv": KVConfig(memory=POOL_BYTES),
            "slo": SloConfig(),
            "heartbeat_timeout_s": 30.0,
        }

        def spec(name: str, mode: str) -> WorkerSpec:
            worker = WorkerId(name=name, incarnation=1)
            section = TransferConfig(transport=transport, mode=mode)  # pyright: ignore
            if name == "decode":
                # as large a chunk as prefill's, so that colocated is the same computation
                pool: Any = {"decode": DecodeConfig(threads=1, max_batch_tokens=CHUNK)}
            else:
                pool = {"prefill": PrefillConfig(threads=1, max_batch_tokens=CHUNK)}
            return WorkerSpec(worker=worker, transfer=section, **shared, **pool)

        self.decode = Worker(spec("decode", "auto"))
        self.prefill = {mode: Worker(spec(f"p-{mode}", mode)) for mode in ("push", "pull")}
        self.draw = random.Random(0)
        self.count = 0

    def close(self) -> None:
        for worker in (self.decode, *self.prefill.values()):
            worker.close()

    def request(self, length: int) -> Request:
        """Of tokens that no cache knows."""
        self.count += 1
        tokens = tuple(self.draw.randrange(2, SHAPE.vocab) for _ in range(length))
        sampling = SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True)
        return Request(
            id=str(self.count), token_ids=tokens, num_prompt_tokens=length, sampling=sampling
        )

    def colocated(self, length: int) -> Measured:
        request = self.request(length)
        begin_s = time.monotonic()
        self.decode.do("submit", request)
        first, second = self.decode.until_token(2)[-2:]
        self.decode.rest()
        return Measured(first.at_s - begin_s, second.at_s - first.at_s, 0.0)

    def handed_over(self, mode: str, length: int) -> Measured:
        request = self.request(length)
        before_s = self.prefill[mode].exposed_s()
        begin_s = time.monotonic()
        self.prefill[mode].do("submit", request, self.decode.address)
        first = self.prefill[mode].until_token()[-1]
        handoff: Handoff = first.report.handoffs[0]
        assert handoff.granted == (mode == "push"), f"{mode}: the transfer went the other way"
        self.decode.do(
            "resume",
            request,
            first_token=handoff.first_token,
            lease=handoff.lease,
            granted=handoff.granted,
            source=handoff.source,
        )
        second = self.decode.until_token()[-1]
        self.decode.rest()
        exposed_s = self.prefill[mode].exposed_s() - before_s
        landed = self.prefill[mode].landed() + self.decode.landed()
        early = sum(count for at_s, count in landed if at_s <= first.at_s)
        share = early / sum(count for _, count in landed)
        return Measured(first.at_s - begin_s, second.at_s - first.at_s, exposed_s, share)

    def measure(self, mode: str, length: int) -> Measured:
        return self.colocated(length) if mode == "colocated" else self.handed_over(mode, length)

    def row(self, length: int, repeats: int) -> Row:
        taken: dict[str, list[Measured]] = {"colocated": [], "push": [], "pull": []}
        for _ in range(repeats):
            for mode, measured in taken.items():
                measured.append(self.measure(mode, length))

        def middle(mode: str, name: str) -> float:
            return statistics.median(getattr(m, name) for m in taken[mode]) * 1e3

        push, pull = middle("push", "exposed_s"), middle("pull", "exposed_s")
        token_bytes = 2 * SHAPE.layers * SHAPE.kv_heads * (SHAPE.hidden // SHAPE.heads) * 4
        return Row(
            tokens=length,
            mib=length * token_bytes / 2**20,
            prefill_ms=middle("push", "prefill_s"),
            exposed_push_ms=push,
            exposed_pull_ms=pull,
            landed=middle("push", "landed") / 1e3,
            hidden=1 - push / pull,
            second_colocated_ms=middle("colocated", "second_s"),
            second_push_ms=middle("push", "second_s"),
            second_pull_ms=middle("pull", "second_s"),
        )


def checkpoint(folder: Path) -> Path:
    """Random weights with positions for the longest prompt."""
    path = write_checkpoint(folder / "random", SHAPE)
    config = json.loads((path / "config.json").read_text())
    config["max_position_embeddings"] = MAX_MODEL_LEN
    (path / "config.json").write_text(json.dumps(config))
    return path


def table(rows: list[Row]) -> Table:
    shown = Table(title="times in ms; 2nd: from the first token to the second")
    for name in ("tokens", "KV MiB", "prefill", "exposed push", "exposed pull", "landed", "hidden"):
        shown.add_column(name, justify="right")
    for name in ("2nd colocated", "2nd push", "2nd pull"):
        shown.add_column(name, justify="right")
    for row in rows:
        base = row.second_colocated_ms
        shown.add_row(
            str(row.tokens),
            f"{row.mib:.0f}",
            f"{row.prefill_ms:.0f}",
            f"{row.exposed_push_ms:.2f}",
            f"{row.exposed_pull_ms:.2f}",
            f"{row.landed:.0%}",
            f"{row.hidden:.0%}",
            f"{base:.1f}",
            f"{row.second_push_ms:.1f} ({row.second_push_ms / base - 1:+.0%})",
            f"{row.second_pull_ms:.1f} ({row.second_pull_ms / base - 1:+.0%})",
        )
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--lengths", type=int, nargs="+", default=list(LENGTHS))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--transport", default="shm", choices=["shm", "tcp", "gloo"])
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(checkpoint(Path(folder)), arguments.transport)
        bench.row(max(LENGTHS), 1)  # connects, compiles, and touches every page of the pools
        rows = [bench.row(length, arguments.repeats) for length in arguments.lengths]
        bench.close()
    Console(width=120).print(table(rows))
    if arguments.json:
        report = {"transport": arguments.transport, "rows": [asdict(row) for row in rows]}
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
