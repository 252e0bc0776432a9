"""The gRPC service that clients call: requests in, pieces of streams out."""

from __future__ import annotations

from typing import NoReturn

import grpc

from ..engine.errors import PhasewiseError
from .admission import Admission
from .error_status import grpc_code, trailing_metadata
from .output import Output
from .proto import phasewise_pb2 as pb
from .proto.phasewise_pb2_grpc import GenerationServicer
from .router import Router


class GenerationService(GenerationServicer):
    """A handler's one write in flight is its client's back-pressure: what comes meanwhile goes
    out together. A call that is cancelled, however, ends the request at once."""

    def __init__(self, admission: Admission, router: Router) -> None:
        self._admission = admission
        self._router = router

    async def Generate(
        self, request: pb.GenerateRequest, context: grpc.aio.ServicerContext
    ) -> None:
        try:
            self._honour_deadline(request, context.time_remaining())
            admitted = await self._admission.admit(request)
            generation = self._router.start(admitted)
        except PhasewiseError as error:
            await abort_call(context, error)
        try:
            async for output in generation.outputs():
                await context.write(output_to_pb(output))
        except PhasewiseError as error:
            await abort_call(context, error)
        finally:
            generation.cancel("the client went away")

    async def Abort(
        self, request: pb.AbortRequest, context: grpc.aio.ServicerContext
    ) -> pb.AbortResponse:
        return pb.AbortResponse(found=self._router.abort(request.request_id))

    def _honour_deadline(self, request: pb.GenerateRequest, left_s: float | None) -> None:
        """The sooner of the request's own limit and the call's."""
        if left_s is None:
            return
        left_s = max(left_s, 1e-3)
        if not request.HasField("timeout_s") or request.timeout_s > left_s:
            request.timeout_s = min(left_s, self._router.limits.timeout_s)


async def abort_call(context: grpc.aio.ServicerContext, error: PhasewiseError) -> NoReturn:
    await context.abort(grpc_code(error), str(error), trailing_metadata(error))
    raise AssertionError("abort raises")


def output_to_pb(output: Output) -> pb.GenerateResponse:
    message = pb.GenerateResponse(
        request_id=output.request_id,
        index=output.index,
        token_ids=output.token_ids,
        text=output.text,
    )
    for entry in output.logprobs:
        message.logprobs.add(sampled=entry.sampled, top_ids=entry.top_ids, top=entry.top)
    if output.finish_reason is not None:
        message.finish_reason = output.finish_reason
    if output.usage is not None:
        message.usage.prompt_tokens = output.usage.prompt_tokens
        message.usage.completion_tokens = output.usage.completion_tokens
        message.usage.cached_tokens = output.usage.cached_tokens
    if (timings := output.timings) is not None:
        message.timings.CopyFrom(
            pb.Timings(
                queue_ms=timings.queue_ms,
                prefill_ms=timings.prefill_ms,
                transfer_ms=timings.transfer_ms,
                ttft_ms=timings.ttft_ms,
                tpot_ms=timings.tpot_ms,
                e2e_ms=timings.e2e_ms,
                workers=timings.workers,
                failovers=timings.failovers,
                preemptions=timings.preemptions,
                local_prefill=timings.local_prefill,
            )
        )
    return message
