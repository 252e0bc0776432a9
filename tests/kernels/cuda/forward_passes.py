"""Whole models by the Triton operators: what the process that runs the interpreter does."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from phasewise.decode_worker.scheduler import DecodeLimits, DecodeScheduler
from phasewise.engine import rank
from phasewise.engine.batch import Batch, StepOutput, Underway
from phasewise.engine.blocks import BlockAllocator
from phasewise.engine.request import Request, SamplingParams, TokenLogprobs
from phasewise.engine.runner import Runner, build_runner
from phasewise.engine.sequence import Sequence
from phasewise.kernels.cuda.operators import CudaOperators


@dataclass(frozen=True, kw_only=True)
class Served:
    """What was generated for each prompt, and how the work was done."""

    tokens: list[list[int]]
    device_steps: int  # steps from state on the device
    logprobs: list[list[TokenLogprobs]]


def triton_runner(directory: Path, *, max_decode_rows: int, kv_dtype: str = "auto") -> Runner:
    """A runner on CPU tensors whose operators are the GPU's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rank, "operators", lambda **_: CudaOperators(multiprocessors=2))
        runner = build_runner(
            directory, num_blocks=40, max_model_len=96, threads=1, kv_dtype=kv_dtype
        )
    assert runner.keep_decode_on_device(max_decode_rows) is not None
    return runner


def serve(
    directory: Path,
    requests: list[tuple[list[int], SamplingParams]],
    chunk: int,
    rows: int,
    kv_dtype: str = "auto",
) -> Served:
    """Chunks and decoding rows together; a new sequence joins as soon as one of `rows` is free.

    Decoding steps are padded wherever `rows` is no bucket.
    """
    torch.set_num_threads(1)
    runner = triton_runner(directory, max_decode_rows=8, kv_dtype=kv_dtype)
    free = list(range(runner.layout.num_blocks))[::-3] + list(range(runner.layout.num_blocks))
    free = list(dict.fromkeys(free))
    waiting = [_sequence(i, *request) for i, request in enumerate(requests)]
    everyone, running, device_steps = list(waiting), list[Sequence](), 0
    logprobs: list[list[TokenLogprobs]] = [[] for _ in everyone]
    while waiting or running:
        while waiting and len(running) < rows:
            running.append(waiting.pop(0))
        running.sort(key=lambda s: s.num_uncomputed > 1)
        for sequence in running:
            while len(sequence.blocks) < runner.layout.blocks_for(sequence.num_tokens):
                sequence.blocks.append(free.pop())
        counts = [min(chunk, s.num_uncomputed) for s in running]
        batch = Batch(
            sequences=list(running), starts=[s.num_computed for s in running], counts=counts
        )
        assert runner._graphs is not None
        device_steps += runner._graphs.takes(batch)
        output = runner.run(batch)
        for row, (sequence, count) in enumerate(zip(batch.sequences, counts, strict=True)):
            samples = batch.samples(row)
            sequence.num_computed += count
            if samples:
                sequence.append(output.token_ids[row])
            entry = output.logprobs[row] if output.logprobs else None
            if entry is not None:
                logprobs[int(sequence.id)].append(entry)
            if sequence.num_output_tokens == sequence.request.sampling.max_tokens:
                running.remove(sequence)
                free += sequence.blocks  # the next one may write there at once
    return Served(
        tokens=[(s.tokens or [])[s.num_prompt_tokens :] for s in everyone],
        device_steps=device_steps,
        logprobs=logprobs,
    )


def serve_ahead(
    directory: Path, requests: list[tuple[list[int], SamplingParams]], rows: int
) -> Served:
    """As the decode scheduler says: each step that can be is launched before the tokens of the one
    before are asked for. `device_steps` are those that followed such a one."""
    torch.set_num_threads(1)
    runner = triton_runner(directory, max_decode_rows=8)
    allocator = BlockAllocator(runner.layout.num_blocks, runner.layout.block_size)
    limits = DecodeLimits(max_batch_size=rows, max_batch_tokens=rows + 40, max_model_len=96)
    decode = DecodeScheduler(allocator, limits)
    everyone = [_sequence(i, *request) for i, request in enumerate(requests)]
    for sequence in everyone:
        decode.add(sequence, 0.0)
    tokens: dict[str, list[int]] = {sequence.id: [] for sequence in everyone}
    step, followed = _launch(runner, decode, None), 0
    while step is not None:
        batch, begun = step
        following = _launch(runner, decode, begun)
        followed += following is not None
        output = begun if isinstance(begun, StepOutput) else begun.output()
        progress = decode.advance(batch, output, 0.0)
        decode.check()
        for sequence, token_id in zip(progress.sequences, progress.token_ids, strict=True):
            tokens[sequence.id].append(token_id)
        step = following or _launch(runner, decode, None)
    return Served(tokens=list(tokens.values()), device_steps=followed, logprobs=[])


def _launch(
    runner: Runner, decode: DecodeScheduler, former: StepOutput | Underway | None
) -> tuple[Batch, StepOutput | Underway] | None:
    batch = decode.next_batch(0.0)
    return None if batch is None else (batch, runner.begin(batch, None, former))


class Recorder:
    """Chooses the tokens it was given, and keeps the logits it saw."""

    def __init__(self, tokens: list[int]) -> None:
        self.tokens = list(tokens)
        self.logits: list[torch.Tensor] = []

    def sample(
        self, logits: torch.Tensor, sequences: list[Sequence], positions: list[int]
    ) -> tuple[list[int], None]:
        self.logits.append(logits.clone())
        return [self.tokens.pop(0)], None


def logits_of(directory: Path, prompt: list[int], tokens: list[int], chunk: int) -> torch.Tensor:
    """Logits [len(tokens), vocab] from which `tokens` follow `prompt`, the last ones' from state
    on the device."""
    torch.set_num_threads(1)
    runner = triton_runner(directory, max_decode_rows=1)
    runner._sampler = recorder = Recorder(tokens)
    assert runner.keep_decode_on_device(1) is not None  # again: with this sampler
    sequence = _sequence(0, prompt, SamplingParams(max_tokens=len(tokens), temperature=0.0))
    sequence.blocks = [31, 3, 17, 4, 38, 0]
    while sequence.num_output_tokens < len(tokens):
        count = min(chunk, sequence.num_uncomputed)
        batch = Batch(sequences=[sequence], starts=[sequence.num_computed], counts=[count])
        samples = batch.samples(0)
        (token,) = runner.run(batch).token_ids
        sequence.num_computed += count
        if samples:
            sequence.append(token)
    return torch.cat(recorder.logits)


def _sequence(number: int, prompt: list[int], sampling: SamplingParams) -> Sequence:
    return Sequence(
        Request(
            id=str(number),
            token_ids=tuple(prompt),
            num_prompt_tokens=len(prompt),
            sampling=sampling,
        )
    )
