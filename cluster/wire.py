"""Between the engine's dataclasses and the messages of `proto/worker.proto`."""

from __future__ import annotations

from ..engine.request import Request, SamplingParams, TokenLogprobs, TransferAddress, WorkerId
from .proto import worker_pb2 as pb


def sampling_to_pb(sampling: SamplingParams) -> pb.Sampling:
    """`stop` strings stay behind: they are matched where text is made, in the gateway."""
    return pb.Sampling(
        max_tokens=sampling.max_tokens,
        min_tokens=sampling.min_tokens,
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        min_p=sampling.min_p,
        repetition_penalty=sampling.repetition_penalty,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        logit_bias=sampling.logit_bias,
        seed=sampling.seed,
        stop_token_ids=sampling.stop_token_ids,
        ignore_eos=sampling.ignore_eos,
        logprobs=sampling.logprobs,
    )


def sampling_from_pb(message: pb.Sampling) -> SamplingParams:
    return SamplingParams(
        max_tokens=message.max_tokens,
        min_tokens=message.min_tokens,
        temperature=message.temperature,
        top_k=message.top_k,
        top_p=message.top_p,
        min_p=message.min_p,
        repetition_penalty=message.repetition_penalty,
        presence_penalty=message.presence_penalty,
        frequency_penalty=message.frequency_penalty,
        logit_bias=dict(message.logit_bias),
        seed=message.seed,
        stop_token_ids=tuple(message.stop_token_ids),
        ignore_eos=message.ignore_eos,
        logprobs=message.logprobs if message.HasField("logprobs") else None,
    )


def request_to_pb(request: Request, *, now_s: float, deadline_s: float) -> pb.Request:
    """Clocks are not shared: times travel as an age and as time left (0: no deadline)."""
    return pb.Request(
        id=request.id,
        token_ids=request.token_ids,
        num_prompt_tokens=request.num_prompt_tokens,
        sampling=sampling_to_pb(request.sampling),
        age_s=now_s - request.arrival_s,
        ttft_ms=request.ttft_ms,
        tpot_ms=request.tpot_ms,
        slo_class=request.slo_class,
        priority=request.priority,
        cache_salt=request.cache_salt,
        deadline_s=max(1e-3, deadline_s - now_s) if deadline_s else 0.0,
    )


def request_from_pb(message: pb.Request, *, now_s: float) -> Request:
    """Arrival on the receiver's clock; the deadline stays beside, in `message.deadline_s`."""
    return Request(
        id=message.id,
        token_ids=tuple(message.token_ids),
        num_prompt_tokens=message.num_prompt_tokens,
        sampling=sampling_from_pb(message.sampling),
        arrival_s=now_s - message.age_s,
        ttft_ms=message.ttft_ms,
        tpot_ms=message.tpot_ms,
        slo_class=message.slo_class,
        priority=message.priority,
        cache_salt=message.cache_salt,
    )


def address_to_pb(address: TransferAddress) -> pb.TransferAddress:
    return pb.TransferAddress(
        worker=pb.WorkerRef(name=address.worker.name, incarnation=address.worker.incarnation),
        host_id=address.host_id,
        shm=address.shm,
        tcp=address.tcp,
        ranks=[address_to_pb(rank) for rank in address.ranks],
        holds=address.holds,
    )


def address_from_pb(message: pb.TransferAddress) -> TransferAddress:
    return TransferAddress(
        worker=worker_id(message.worker),
        host_id=message.host_id,
        shm=message.shm,
        tcp=message.tcp,
        ranks=tuple(address_from_pb(rank) for rank in message.ranks),
        holds=tuple(message.holds),
    )


def worker_id(message: pb.WorkerRef) -> WorkerId:
    return WorkerId(name=message.name, incarnation=message.incarnation)


def logprobs_from_pb(message: pb.Logprobs) -> TokenLogprobs:
    return TokenLogprobs(
        sampled=message.sampled, top_ids=tuple(message.top_ids), top=tuple(message.top)
    )


def logprobs_to_pb(slot: int, logprobs: TokenLogprobs) -> pb.Logprobs:
    return pb.Logprobs(
        slot=slot, sampled=logprobs.sampled, top_ids=logprobs.top_ids, top=logprobs.top
    )
