"""The process at the other end of `worker.proto`, with a formula where the model would be.

Tokens depend on the prompt and the position alone, so a stream that moves between workers is the
same stream. Faults are switches.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

import grpc
from phasewise.cluster.proto import worker_pb2 as pb
from phasewise.cluster.proto.worker_pb2_grpc import WorkerServicer, add_WorkerServicer_to_server

VOCAB = 256

Run = Callable[[Any], Any]  # of the fixture `run`
Serving = Callable[..., Any]  # of the fixture `serving`
INCARNATIONS = itertools.count(1)


def expected(prompt: list[int], count: int, first: int = 0) -> list[int]:
    """The tokens `first` to `first + count` after `prompt`."""
    return [(sum(prompt) * 31 + 7 * i + 97) % VOCAB for i in range(first, first + count)]


@dataclass
class Row:
    prompt: list[int]
    max_tokens: int
    num_output: int
    logprobs: bool
    handoff: bool = False

    def next(self) -> int:
        self.num_output += 1
        return expected(self.prompt, 1, self.num_output - 1)[0]


class FakeWorker(WorkerServicer):
    def __init__(self, role: str, name: str, *, step_s: float = 0.002) -> None:
        self.role = role
        self.ref = pb.WorkerRef(name=name, incarnation=next(INCARNATIONS))
        self.step_s = step_s
        self.granted = True
        self.silent = False  # neither tokens nor heartbeats
        self.stalled = False  # heartbeats, but neither tokens nor answers
        self.step_age_s = 0.0  # of its step in progress, as it tells
        self.mute: asyncio.Event | None = None  # questions wait for it
        self.fail_next: list[pb.Failed] = []
        self.stop_after: int | None = None  # tokens until the process is gone
        self.rows: dict[int, Row] = {}
        self.submits: list[pb.Submit] = []
        self.resumes: list[pb.Resume] = []
        self.num_aborts = 0
        self.address = ""
        self._failed: list[pb.Failed] = []
        self._server: grpc.aio.Server | None = None

    async def start(self, address: str = "127.0.0.1:0") -> FakeWorker:
        self._server = grpc.aio.server(options=[("grpc.max_receive_message_length", -1)])
        add_WorkerServicer_to_server(self, self._server)
        self.address = f"127.0.0.1:{self._server.add_insecure_port(address)}"
        await self._server.start()
        return self

    async def stop(self) -> None:
        """A second stop of one grpc.aio server hangs or crashes the process."""
        server, self._server = self._server, None
        if server is not None:
            await server.stop(None)

    async def Describe(self, request: Any, context: Any) -> pb.Description:
        if self.mute is not None:
            await self.mute.wait()
        return pb.Description(
            worker=self.ref,
            role=self.role,
            transfer=pb.TransferAddress(worker=self.ref, tcp=self.address),
            max_model_len=512,
            max_batch_size=64,
            load=self.load(),
            pid=4242,
        )

    def load(self) -> pb.Load:
        blocks = pb.Blocks(total=64, free=64)
        return pb.Load(running=len(self.rows), blocks=blocks, step_age_s=self.step_age_s)

    async def Attach(self, request_iterator: Any, context: Any) -> AsyncIterator[pb.FromWorker]:
        self.rows.clear()
        reader = asyncio.create_task(self._read(request_iterator))
        try:
            while True:
                await asyncio.sleep(self.step_s)
                if not self.silent:
                    yield self._step()
        finally:
            reader.cancel()
            self.rows.clear()
            with contextlib.suppress(asyncio.CancelledError):
                await reader

    async def _read(self, messages: Any) -> None:
        async for message in messages:
            for submit in message.submit:
                self.submits.append(submit)
                self._open(submit.slot, submit.request, handoff=submit.HasField("decode"))
            for resume in message.resume:
                self.resumes.append(resume)
                row = self._open(resume.slot, resume.request, handoff=False)
                row.num_output += 1
            for slot in message.abort:
                self.num_aborts += 1
                if not self.stalled and self.rows.pop(slot, None) is not None:
                    self._failed.append(pb.Failed(slot=slot, code=pb.Failed.CANCELLED))

    def _open(self, slot: int, request: pb.Request, *, handoff: bool) -> Row:
        assert slot not in self.rows, "the gateway opened a slot twice"
        row = Row(
            prompt=list(request.token_ids[: request.num_prompt_tokens]),
            max_tokens=request.sampling.max_tokens,
            num_output=len(request.token_ids) - request.num_prompt_tokens,
            logprobs=request.sampling.HasField("logprobs"),
            handoff=handoff,
        )
        if self.fail_next:
            failed = self.fail_next.pop(0)
            failed.slot = slot
            self._failed.append(failed)
        else:
            self.rows[slot] = row
        return row

    def _step(self) -> pb.FromWorker:
        message = pb.FromWorker(load=self.load(), failed=self._failed)
        self._failed = []
        for slot, row in [] if self.stalled else list(self.rows.items()):
            token = row.next()
            beside = pb.Logprobs(slot=slot, sampled=-0.5, top_ids=[token], top=[-0.5])
            if row.handoff:
                message.handoffs.add(
                    slot=slot,
                    first_token=token,
                    lease=slot + 1,
                    granted=self.granted,
                    source=pb.TransferAddress(worker=self.ref),
                    queue_s=0.001,
                    prefill_s=0.002,
                    logprobs=beside if row.logprobs else None,
                )
                del self.rows[slot]
                continue
            message.slots.append(slot)
            message.token_ids.append(token)
            if row.logprobs:
                message.logprobs.append(beside)
            if row.num_output >= row.max_tokens:
                message.finished.add(slot=slot, reason="length", transfer_s=0.003)
                del self.rows[slot]
        if self.stop_after is not None and message.slots:
            self.stop_after -= 1
            if self.stop_after <= 0:
                self.stop_after = None
                asyncio.get_running_loop().create_task(self.stop())
        return message
