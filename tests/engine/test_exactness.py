"""Law 1: greedy float32 tokens and logits equal transformers' on random checkpoints.

Checkpoints are random with a large initialiser, so that logits spread; still, two logits may tie
within float32 rounding. A mismatch is excused only there: the top-2 margin of the reference must
be below `TIE`, and the failure message says it.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from phasewise.engine.batch import Batch
from phasewise.engine.request import Request, SamplingParams
from phasewise.engine.runner import Runner, build_runner
from phasewise.engine.sequence import Sequence

transformers = pytest.importorskip("transformers")

TIE = 1e-4  # float32 rounding over three layers with logits of order 10
OUTPUT = 8
LENGTHS = (1, 15, 16, 17, 211)

ROTARY: dict[str, Any] = {
    "vocab_size": 131,
    "hidden_size": 48,
    "intermediate_size": 72,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 10,
    "max_position_embeddings": 1024,
    "initializer_range": 0.3,
    "eos_token_id": None,
    "bos_token_id": None,
    "pad_token_id": None,
}


def _rope(**values: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_theta": 10000.0, **values}}


QWEN_EXPERTS = {"num_experts": 9, "num_experts_per_tok": 3, "moe_intermediate_size": 24}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama-biases-tied": (
        "Llama",
        {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    ),
    "llama-head-dim-33-blocks": ("Llama", {"head_dim": 66, "num_key_value_heads": 6}),
    "llama-linear": ("Llama", _rope(rope_type="linear", factor=4.0)),
    "llama-dynamic": (
        "Llama",
        {"max_position_embeddings": 64} | _rope(rope_type="dynamic", factor=2.0),
    ),
    "llama-llama3": (
        "Llama",
        _rope(
            rope_type="llama3",
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=64,
        ),
    ),
    "llama-yarn": (
        "Llama",
        _rope(rope_type="yarn", factor=4.0, original_max_position_embeddings=64),
    ),
    "mistral-window": ("Mistral", {"sliding_window": 37}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "mixtral": ("Mixtral", {"num_local_experts": 5}),
    "mixtral-window-tied": (
        "Mixtral",
        {"num_local_experts": 4, "sliding_window": 37, "tie_word_embeddings": True},
    ),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen2-window": (
        "Qwen2",
        {"use_sliding_window": True, "sliding_window": 21, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3", {"attention_bias": True}),
    "qwen3-window": (
        "Qwen3",
        {"use_sliding_window": True, "sliding_window": 40, "max_window_layers": 2},
    ),
    "qwen3-moe": ("Qwen3Moe", QWEN_EXPERTS),
    "qwen3-moe-renormalised-dense-between": (
        "Qwen3Moe",
        QWEN_EXPERTS | {"norm_topk_prob": True, "decoder_sparse_step": 2, "attention_bias": True},
    ),
    "qwen3-moe-window-dense-first": (
        "Qwen3Moe",
        QWEN_EXPERTS | {"mlp_only_layers": [0], "use_sliding_window": True, "sliding_window": 40},
    ),
    "opt": ("OPT", {}),
    "opt-350m-order": ("OPT", {"do_layer_norm_before": False, "word_embed_proj_dim": 20}),
    "opt-bare": ("OPT", {"enable_bias": False, "layer_norm_elementwise_affine": False}),
}
OPT: dict[str, Any] = {
    "vocab_size": 131,
    "hidden_size": 60,
    "ffn_dim": 72,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "max_position_embeddings": 300,
    "init_std": 0.3,
    "eos_token_id": None,
    "bos_token_id": None,
    "pad_token_id": 1,
}


def _reference(name: str, **sizes: Any) -> Any:
    """A random transformers model whose biases and norms are random too."""
    family, changes = MODELS[name]
    base = OPT if family == "OPT" else ROTARY
    if family == "Qwen2":  # has no head_dim of its own
        base = {key: value for key, value in base.items() if key != "head_dim"}
    config = getattr(transformers, f"{family}Config")(**(base | changes | sizes))
    torch.manual_seed(len(name))
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith("bias") or "norm" in key:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def _forget_lengths(model: Any) -> None:
    """Bring `dynamic` frequencies back to a fresh model's: transformers keeps those of the longest
    sequence so far until a short one comes."""
    with torch.no_grad():
        model(torch.tensor([[0]]))


class Case:
    """One checkpoint: the reference in memory and its directory."""

    def __init__(self, name: str, directory: Path, **sizes: Any) -> None:
        self.directory = directory
        self.model = _reference(name, **sizes)
        self.model.save_pretrained(directory)
        self.prompts = [
            [random.Random(length).randrange(131) for _ in range(length)] for length in LENGTHS
        ]
        self._known: dict[tuple[int, ...], list[int]] = {}

    def generate(self, prompt: list[int], count: int = OUTPUT) -> list[int]:
        """The greedy tokens, of which the first are the same however many are asked for."""
        known = self._known.setdefault(tuple(prompt), [])
        if len(known) < count:
            known[:] = self._generate(prompt, count)
        return known[:count]

    def _generate(self, prompt: list[int], count: int) -> list[int]:
        _forget_lengths(self.model)
        ids = torch.tensor([prompt])
        out = self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=count,
            do_sample=False,
            eos_token_id=None,
        )
        return out[0, len(prompt) :].tolist()

    def margin(self, tokens: list[int]) -> float:
        """Distance of the two largest logits after `tokens`."""
        with torch.no_grad():
            top = self.model(torch.tensor([tokens])).logits[0, -1].topk(2).values
        return float(top[0] - top[1])


@pytest.fixture(scope="module", params=sorted(MODELS))
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(request.param, tmp_path_factory.mktemp(request.param))


class Recorder:
    """Greedy choice that keeps the logits it saw."""

    def __init__(self) -> None:
        self.logits: list[torch.Tensor] = []

    def sample(
        self, logits: torch.Tensor, sequences: list[Sequence], positions: list[int]
    ) -> tuple[list[int], None]:
        self.logits.append(logits.clone())
        return logits.argmax(-1).tolist(), None


def _runner(directory: Path, **values: Any) -> Runner:
    options: dict[str, Any] = {"num_blocks": 64, "max_model_len": 300, "threads": 1} | values
    return build_runner(directory, **({"sampler": Recorder()} | options))


def _sequence(prompt: list[int], blocks: list[int], count: int = OUTPUT) -> Sequence:
    request = Request(
        id=str(len(prompt)),
        token_ids=tuple(prompt),
        num_prompt_tokens=len(prompt),
        sampling=SamplingParams(max_tokens=count, temperature=0.0),
    )
    sequence = Sequence(request)
    sequence.blocks = blocks
    return sequence


def _scattered(prompts: list[list[int]], runner: Runner, seed: int) -> list[Sequence]:
    """Sequences whose blocks lie in random order with holes between."""
    free = list(range(runner.layout.num_blocks))
    random.Random(seed).shuffle(free)
    sequences = []
    for prompt in prompts:
        need = runner.layout.blocks_for(len(prompt) + OUTPUT)
        sequences.append(_sequence(prompt, free[:need]))
        free = free[need:]
    return sequences


def _run(runner: Runner, sequences: list[Sequence], chunk: int, count: int = OUTPUT) -> None:
    """Decode rows first, then chunks, until every sequence has `count` new tokens."""
    while live := [s for s in sequences if s.num_output_tokens < count]:
        live.sort(key=lambda s: s.num_uncomputed > 1)
        counts = [min(chunk, s.num_uncomputed) for s in live]
        batch = Batch(sequences=live, starts=[s.num_computed for s in live], counts=counts)
        output = runner.run(batch)
        for row, (sequence, done, token) in enumerate(
            zip(live, counts, output.token_ids, strict=True)
        ):
            samples = batch.samples(row)
            sequence.num_computed += done
            assert (token >= 0) == samples
            if samples:
                sequence.append(token)


def _assert_same(case: Case, prompt: list[int], tokens: list[int], expected: list[int]) -> None:
    for at, (mine, theirs) in enumerate(zip(tokens, expected, strict=True)):
        if mine != theirs:
            margin = case.margin(prompt + expected[:at])
            assert margin < TIE, (
                f"prompt of {len(prompt)}, output {at}: {mine} for {theirs}, margin {margin:.2e}"
            )
            return


@pytest.mark.parametrize("chunk", [5, 16, 40, 500])
def test_greedy_tokens_equal_generate_for_mixed_batches_and_chunks(case: Case, chunk: int) -> None:
    runner = _runner(case.directory)
    sequences = _scattered(case.prompts, runner, seed=chunk)
    _run(runner, sequences, chunk)
    for prompt, sequence in zip(case.prompts, sequences, strict=True):
        assert sequence.tokens is not None
        _assert_same(case, prompt, sequence.tokens[len(prompt) :], case.generate(prompt))


def _reference_steps(model: Any, prompt: list[int]) -> tuple[list[int], torch.Tensor]:
    """Tokens that `generate` chose and the logits [OUTPUT, vocab] it chose them from."""
    _forget_lengths(model)
    ids = torch.tensor([prompt])
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=OUTPUT,
        do_sample=False,
        eos_token_id=None,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return out.sequences[0, len(prompt) :].tolist(), torch.cat(out.logits).float()


def _logits(directory: Path, prompt: list[int], forced: list[int], **values: Any) -> torch.Tensor:
    """Our logits where `generate` looked, fed with the tokens it chose: [OUTPUT, vocab]."""
    runner = _runner(directory, **values)
    recorder = Recorder()
    runner._sampler = recorder
    sequence = _sequence(prompt, list(range(runner.layout.num_blocks))[::-2])
    for token in forced:
        while sequence.num_uncomputed:
            count = min(40, sequence.num_uncomputed)
            batch = Batch(sequences=[sequence], starts=[sequence.num_computed], counts=[count])
            runner.run(batch)
            sequence.num_computed += count
        sequence.append(token)
    return torch.cat(recorder.logits)


def test_float32_logits_equal_those_of_generate_at_every_step(case: Case) -> None:
    prompt = case.prompts[-1]
    tokens, theirs = _reference_steps(case.model, prompt)
    mine = _logits(case.directory, prompt, tokens)
    # Two orders of summing n terms differ by about eps * sqrt(n) of the terms' size; three layers
    # of a few hundred terms, amplified by large weights, stay within 2000 eps of the spread.
    bound = 2000 * torch.finfo(torch.float32).eps * float(theirs.abs().max())
    assert float((mine - theirs).abs().max()) < bound


def test_bfloat16_logits_are_as_near_to_float32_as_those_of_transformers(case: Case) -> None:
    prompt = case.prompts[3]
    tokens, exact = _reference_steps(case.model, prompt)
    copy = type(case.model).from_pretrained(case.directory, dtype=torch.bfloat16).eval()
    ids = torch.tensor([prompt + tokens[:-1]])
    with torch.no_grad():
        theirs = copy(ids).logits[0, len(prompt) - 1 :].float()
    mine = _logits(case.directory, prompt, tokens, dtype="bfloat16")
    # Both round each product and sum to 8 bits, in other places: the errors are of one size, of
    # which root mean squares over OUTPUT * vocab values tell within a factor; 1.5 leaves room.
    rounding = float((theirs - exact).square().mean().sqrt())
    assert float((mine - exact).square().mean().sqrt()) < 1.5 * rounding
    assert float((mine - theirs).square().mean().sqrt()) < 2.5 * rounding


def test_float16_logits_by_torch_operators_are_near_float32(case: Case) -> None:
    prompt = case.prompts[3]
    tokens, exact = _reference_steps(case.model, prompt)
    mine = _logits(case.directory, prompt, tokens, dtype="float16")
    # float16 keeps 3 bits more than bfloat16: 2^-11 a rounding, some dozens of them, amplified.
    assert float((mine - exact).square().mean().sqrt()) < 0.02 * float(exact.std())


def test_recomputing_after_preemption_leaves_the_same_kv(case: Case) -> None:
    runner = _runner(case.directory)
    prompt = case.prompts[3] * 5
    first, second = _scattered([prompt, prompt], runner, seed=3)
    _run(runner, [first], chunk=16)
    assert first.tokens is not None and second.tokens is not None
    for token in first.tokens[len(prompt) :]:
        second.append(token)
    _run(runner, [second], chunk=500, count=OUTPUT + 1)
    last = len(prompt) + OUTPUT - 1
    kept = [runner.cache.pool[:, s.blocks].permute(2, 0, 3, 1, 4, 5) for s in (first, second)]
    mine, again = (kv.flatten(3, 4)[:, :, :, :last] for kv in kept)
    assert torch.allclose(mine, again, rtol=1e-3, atol=1e-3)


def test_layer_done_follows_each_layers_kv_in_order(case: Case) -> None:
    runner = _runner(case.directory)
    (sequence,) = _scattered([case.prompts[3]], runner, seed=1)
    runner.cache.pool.zero_()
    written: list[bool] = []

    def layer_done(layer: int) -> None:
        assert layer == len(written)
        filled = runner.cache.layers[layer][sequence.blocks[0]]
        later = runner.cache.pool[layer + 1 :]
        written.append(bool((filled != 0).any()) and not bool((later != 0).any()))

    runner.run(Batch(sequences=[sequence], starts=[0], counts=[17]), layer_done)
    assert written == [True] * runner.spec.num_layers
