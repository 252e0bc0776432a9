"""Whole models through the GPU's operators and device-resident decoding, under the interpreter."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from phasewise.engine.batch import Batch
from phasewise.engine.request import Request, SamplingParams
from phasewise.engine.runner import Runner, build_runner
from phasewise.engine.sequence import Sequence
from phasewise.tests.kernels.cuda import forward_passes

transformers = pytest.importorskip("transformers")

SIZES: dict[str, Any] = {
    "vocab_size": 131,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
    "eos_token_id": None,
    "bos_token_id": None,
    "pad_token_id": None,
}
FAMILIES = {
    "Llama": {},
    "Qwen3": {},
    "Mistral": {"sliding_window": 21},
    "Mixtral": {"num_local_experts": 4},
}
LENGTHS = (1, 17, 37)
OUTPUT = 4
TIE = 1e-4  # float32 rounding over two layers


class Case:
    """A random checkpoint and transformers' model of it."""

    def __init__(self, family: str, directory: Path) -> None:
        config = getattr(transformers, f"{family}Config")(**(SIZES | FAMILIES[family]))
        torch.manual_seed(len(family))
        self.directory = directory
        self.model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                if "norm" in name:
                    parameter.add_(0.1 * torch.randn_like(parameter))
        self.model.save_pretrained(directory)
        self.prompts = [[random.Random(n).randrange(131) for _ in range(n)] for n in LENGTHS]

    def generate(self, prompt: list[int]) -> tuple[list[int], torch.Tensor]:
        ids = torch.tensor([prompt])
        out = self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=OUTPUT,
            do_sample=False,
            eos_token_id=None,
            output_logits=True,
            return_dict_in_generate=True,
        )
        return out.sequences[0, len(prompt) :].tolist(), torch.cat(out.logits).float()


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(request.param, tmp_path_factory.mktemp(request.param))


def test_chunks_and_device_decoding_give_the_tokens_that_generate_gives(
    case: Case, interpreted: Any
) -> None:
    greedy = SamplingParams(max_tokens=OUTPUT, temperature=0.0)
    requests = [(prompt, greedy) for prompt in case.prompts]
    served = interpreted(forward_passes.serve, case.directory, requests, chunk=16, rows=2)
    assert served.device_steps >= OUTPUT
    for prompt, tokens in zip(case.prompts, served.tokens, strict=True):
        expected, logits = case.generate(prompt)
        margins = logits.topk(2).values.diff().abs()
        assert margins.min() > TIE, "the checkpoint has no ties"
        assert tokens == expected


def test_logits_by_the_gpus_operators_are_those_of_transformers(
    case: Case, interpreted: Any
) -> None:
    prompt = case.prompts[-1]
    tokens, theirs = case.generate(prompt)
    mine = interpreted(forward_passes.logits_of, case.directory, prompt, tokens, chunk=20)
    bound = 2000 * torch.finfo(torch.float32).eps * float(theirs.abs().max())
    assert float((mine - theirs).abs().max()) < bound


def test_an_fp8_cache_gives_the_cpus_tokens(
    interpreted: Any, tmp_path_factory: pytest.TempPathFactory
) -> None:
    case = Case("Qwen3", tmp_path_factory.mktemp("fp8"))
    greedy = SamplingParams(max_tokens=OUTPUT, temperature=0.0)
    request = (case.prompts[1], greedy)
    served = interpreted(
        forward_passes.serve, case.directory, [request], chunk=10, rows=1, kv_dtype="fp8_e4m3"
    )
    runner = build_runner(
        case.directory, num_blocks=8, max_model_len=96, threads=1, kv_dtype="fp8_e4m3"
    )
    assert served.tokens == [_alone(runner, *request)]


# Each row asks for something else; the last two the device cannot draw by itself.
DRAWS = (
    SamplingParams(max_tokens=5, temperature=0.8, seed=3),
    SamplingParams(max_tokens=4, temperature=0.0),
    SamplingParams(max_tokens=6, temperature=1.3, top_p=0.7, top_k=40, seed=-5),
    SamplingParams(max_tokens=5, temperature=1.0, min_p=0.05, seed=2**63 + 1),
    SamplingParams(max_tokens=4, temperature=1.0, presence_penalty=0.5, seed=9),
    SamplingParams(max_tokens=3, temperature=0.9, logprobs=2, seed=1),
)


def test_device_draws_are_those_of_the_cpu(
    interpreted: Any, tmp_path_factory: pytest.TempPathFactory
) -> None:
    directory = Case("Llama", tmp_path_factory.mktemp("drawn")).directory
    prompts = [[7 * n % 131 for n in range(5 + i)] for i in range(len(DRAWS))]
    requests = list(zip(prompts, DRAWS, strict=True))
    served = interpreted(forward_passes.serve, directory, requests, chunk=16, rows=3)
    assert served.device_steps > 3
    runner = build_runner(directory, num_blocks=8, max_model_len=96, threads=1)
    assert served.tokens == [_alone(runner, *request) for request in requests]
    # Log-probabilities come for the rows that asked, also where the device drew the others.
    assert [len(entries) for entries in served.logprobs] == [0, 0, 0, 0, 0, 3]
    assert all(len(entry.top) == 2 for entry in served.logprobs[-1])


def test_steps_launched_before_the_tokens_before_are_read_give_the_same_tokens(
    interpreted: Any, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Rows that end by stop token, by length and after others; rows that are drawn; new blocks."""
    directory = Case("Llama", tmp_path_factory.mktemp("ahead")).directory
    runner = build_runner(directory, num_blocks=8, max_model_len=96, threads=1)
    draws = [
        SamplingParams(max_tokens=9, temperature=0.0),
        SamplingParams(max_tokens=12, temperature=0.8, seed=3),
        SamplingParams(max_tokens=7, temperature=1.3, top_p=0.7, top_k=40, seed=-5),
        SamplingParams(max_tokens=9, temperature=1.0, min_p=0.05, seed=2**63 + 1),
    ]
    prompts = [[7 * n % 131 for n in range(10 + i)] for i in range(len(draws))]
    expected = [_alone(runner, *request) for request in zip(prompts, draws, strict=True)]
    stops = [streams[4] for streams in expected[:2]]
    for row, stop in enumerate(stops):
        draws[row] = replace(draws[row], stop_token_ids=(stop,))
        expected[row] = expected[row][: expected[row].index(stop) + 1]
    requests = list(zip(prompts, draws, strict=True))
    served = interpreted(forward_passes.serve_ahead, directory, requests, rows=4)
    assert served.tokens == expected
    assert served.device_steps >= 6


def _alone(runner: Runner, prompt: list[int], sampling: SamplingParams) -> list[int]:
    """The stream by the CPU's operators and sampler."""
    sequence = Sequence(
        Request(id="0", token_ids=tuple(prompt), num_prompt_tokens=len(prompt), sampling=sampling)
    )
    sequence.blocks = list(range(8))
    while sequence.num_output_tokens < sampling.max_tokens:
        start, count = sequence.num_computed, sequence.num_uncomputed
        output = runner.run(Batch(sequences=[sequence], starts=[start], counts=[count]))
        sequence.num_computed += count
        sequence.append(output.token_ids[0])
    return (sequence.tokens or [])[len(prompt) :]
