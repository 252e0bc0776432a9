"""A worker process's server: gateways attach here, and the worker's loop runs behind it.

Starts no process and knows nothing of Ray: an actor, a test or a benchmark calls `start`.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
import logging
import os
import threading
import time
from collections.abc import AsyncIterator

import grpc

from ..engine.ranks import RankHost
from ..engine.report import Failed, FailureCode, Report
from ..engine.step_clock import StepClock
from .assembly import AssembledWorker, assemble
from .attachment import Attachment
from .proto import worker_pb2 as pb
from .proto import worker_pb2_grpc as pb_grpc
from .spec import WorkerSpec
from .wire import address_from_pb, request_from_pb

log = logging.getLogger(__name__)

GRPC_OPTIONS = [
    ("grpc.max_receive_message_length", 256 << 20),
    ("grpc.max_send_message_length", 256 << 20),
    ("grpc.so_reuseport", 0),
]


class WorkerService(pb_grpc.WorkerServicer):
    """Speaks `proto/worker.proto` for one worker. Runs on the worker's loop."""

    def __init__(self, assembled: AssembledWorker) -> None:
        self.assembled = assembled
        self.worker = assembled.worker
        self.draining = False
        self._owners: dict[str, tuple[Attachment, int]] = {}  # sequence id -> stream and slot
        self._attachments: set[Attachment] = set()
        self._numbers = itertools.count()

    async def Attach(
        self,
        request_iterator: AsyncIterator[pb.ToWorker],
        context: grpc.aio.ServicerContext,
    ) -> AsyncIterator[pb.FromWorker]:
        attachment = Attachment()
        self._attachments.add(attachment)
        reader = asyncio.create_task(self._read(request_iterator, attachment))
        try:
            attachment.flush(self.load())
            async for message in attachment.messages():
                yield message
        finally:
            reader.cancel()
            self._detach(attachment)

    async def Describe(
        self, request: pb.DescribeRequest, context: grpc.aio.ServicerContext
    ) -> pb.Description:
        description = self.assembled.description()
        description.pid = os.getpid()
        description.load.CopyFrom(self.load())
        return description

    def load(self) -> pb.Load:
        """The worker's load as it stands, for messages and heartbeats."""
        load = self.assembled.load()
        load.draining = self.draining
        return load

    def publish(self, report: Report) -> None:
        """Send a step's news, each row to the gateway that owns it."""
        logprobs = report.logprobs or itertools.repeat(None)
        for sequence_id, token_id, values in zip(
            report.ids, report.token_ids, logprobs, strict=False
        ):
            owner = self._owners.get(sequence_id)
            if owner is not None:
                owner[0].token(owner[1], token_id, values)
        for handoff in report.handoffs:
            owner = self._close(handoff.request.id)
            if owner is not None:
                owner[0].handoff(owner[1], handoff)
        for finished in report.finished:
            owner = self._close(finished.id)
            if owner is not None:
                owner[0].finished(owner[1], finished)
        for failed in report.failed:
            self._fail(failed)
        self.beat()

    def advertise(self) -> None:
        """Have gateways know what the prefix cache holds."""
        index = self.worker.scheduler.prefix.allocator.prefixes
        if index is not None:
            for attachment in self._attachments:
                attachment.prefixes(index)

    def beat(self) -> None:
        """Flush what is unsent; a message without tokens is a heartbeat."""
        load = self.load()
        for attachment in self._attachments:
            attachment.flush(load)

    async def _read(self, messages: AsyncIterator[pb.ToWorker], attachment: Attachment) -> None:
        async for message in messages:
            self.draining |= message.drain
            for submit in message.submit:
                self._submit(attachment, submit)
            for resume in message.resume:
                self._resume(attachment, resume)
            for slot in message.abort:
                self._abort(attachment, slot)
        attachment.close()

    def _submit(self, attachment: Attachment, submit: pb.Submit) -> None:
        sequence_id = self._open(attachment, submit.slot, submit.request)
        if self.draining:
            self._refuse(sequence_id, FailureCode.UNAVAILABLE, "the worker is draining")
            return
        request = dataclasses.replace(
            request_from_pb(submit.request, now_s=time.monotonic()), id=sequence_id
        )
        if not submit.HasField("decode"):
            if self.assembled.decode is None:
                self._refuse(sequence_id, FailureCode.INVALID, "a prefill worker needs a target")
            else:
                self.assembled.decode.submit(request)
        elif self.assembled.prefill is None:
            self._refuse(sequence_id, FailureCode.INVALID, "a decode worker hands nothing over")
        else:
            self.assembled.prefill.submit(request, address_from_pb(submit.decode))

    def _resume(self, attachment: Attachment, resume: pb.Resume) -> None:
        sequence_id = self._open(attachment, resume.slot, resume.request)
        if self.assembled.decode is None:
            self._refuse(sequence_id, FailureCode.INVALID, "a prefill worker resumes nothing")
            return
        self.assembled.decode.resume(
            dataclasses.replace(
                request_from_pb(resume.request, now_s=time.monotonic()), id=sequence_id
            ),
            first_token=resume.first_token,
            lease=resume.lease,
            granted=resume.granted,
            source=address_from_pb(resume.source),
        )

    def _abort(self, attachment: Attachment, slot: int) -> None:
        sequence_id = attachment.ids.get(slot)
        if sequence_id is not None:  # else its terminal entry is on its way already
            self.worker.abort(sequence_id)
            self._refuse(sequence_id, FailureCode.CANCELLED, "aborted")
            self.beat()

    def _open(self, attachment: Attachment, slot: int, request: pb.Request) -> str:
        """A name that no other sequence of this worker ever had, whatever gateways choose."""
        sequence_id = f"{request.id}/{next(self._numbers)}"
        attachment.ids[slot] = sequence_id
        self._owners[sequence_id] = (attachment, slot)
        return sequence_id

    def _close(self, sequence_id: str) -> tuple[Attachment, int] | None:
        owner = self._owners.pop(sequence_id, None)
        if owner is not None:
            del owner[0].ids[owner[1]]
        return owner

    def _refuse(self, sequence_id: str, code: FailureCode, reason: str) -> None:
        self._fail(Failed(id=sequence_id, code=code, reason=reason))
        self.beat()

    def _fail(self, failed: Failed) -> None:
        owner = self._close(failed.id)
        if owner is not None:
            owner[0].failed(owner[1], failed)

    def _detach(self, attachment: Attachment) -> None:
        """The gateway is gone: nobody waits for its requests any more."""
        self._attachments.discard(attachment)
        for sequence_id in list(attachment.ids.values()):
            self._close(sequence_id)
            self.worker.abort(sequence_id)


class WorkerServer:
    """One worker on a thread and event loop of its own."""

    def __init__(self, spec: WorkerSpec, ranks: RankHost | None = None) -> None:
        """`ranks` is where the followers of a worker of several ranks come."""
        self.spec = spec
        self._ranks = ranks
        self._started = threading.Event()
        self._stopping: asyncio.Event
        self._drain_s = 0.0
        self._error: BaseException | None = None
        self._address = ""
        self.steps: StepClock  # of the worker's steps, once it has started
        self._loop: asyncio.AbstractEventLoop
        self._thread = threading.Thread(target=self._run, name="worker-loop", daemon=True)

    def start(self, timeout_s: float = 300.0) -> str:
        """Load the model, listen, and return "host:port". Raises what kept it from starting."""
        self._thread.start()
        if not self._started.wait(timeout_s):
            raise TimeoutError(f"{self.spec.worker} did not start within {timeout_s:.0f} s")
        if self._error is not None:
            raise self._error
        return self._address

    def stop(self, drain_s: float = 0.0) -> None:
        """Finish what is here within `drain_s` seconds, then end everything."""
        if not self._thread.is_alive():
            return
        self._drain_s = drain_s
        self._loop.call_soon_threadsafe(self._stopping.set)
        self._thread.join(drain_s + 10.0)

    def failure(self) -> str | None:
        """What ended the worker's loop; None while it runs."""
        if self._thread.is_alive():
            return None
        return "stopped" if self._error is None else f"{self._error!r}"

    def _run(self) -> None:
        try:
            asyncio.run(self._serve())
        except BaseException as error:  # told by start() or failure(), whatever it was
            log.exception("worker %s ended", self.spec.worker)
            self._error = error
        finally:
            self._started.set()

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._stopping = asyncio.Event()
        async with assemble(self.spec, self._ranks) as assembled:
            self.steps = assembled.worker.steps
            service = WorkerService(assembled)
            server = grpc.aio.server(options=GRPC_OPTIONS)
            pb_grpc.add_WorkerServicer_to_server(service, server)
            port = server.add_insecure_port(f"{self.spec.host}:0")
            await server.start()
            self._address = f"{self.spec.host}:{port}"
            self._started.set()
            try:
                await self._work(service)
            finally:
                await server.stop(0.2)

    async def _work(self, service: WorkerService) -> None:
        """Run until stopped or until one of the worker's own loops breaks."""
        loops = [
            asyncio.create_task(self._step(service)),
            asyncio.create_task(service.worker.follow_transfers()),
            asyncio.create_task(self._heartbeat(service)),
        ]
        stopping = asyncio.create_task(self._stopping.wait())
        try:
            done, _ = await asyncio.wait([*loops, stopping], return_when=asyncio.FIRST_COMPLETED)
            for task in done - {stopping}:
                task.result()  # raises what broke it
            await self._drain(service)
        finally:
            for task in [*loops, stopping]:
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await task

    async def _step(self, service: WorkerService) -> None:
        async for report in service.worker.run():
            service.publish(report)

    async def _heartbeat(self, service: WorkerService) -> None:
        while True:
            await asyncio.sleep(self.spec.heartbeat_s)
            service.assembled.check_ranks()
            service.worker.sweep()
            service.advertise()
            service.beat()

    async def _drain(self, service: WorkerService) -> None:
        service.draining = True
        service.beat()
        deadline_s = time.monotonic() + self._drain_s
        while not service.worker.idle and time.monotonic() < deadline_s:
            await asyncio.sleep(0.05)
