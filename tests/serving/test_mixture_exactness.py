"""Law 1 for mixtures of experts through the whole cluster: who computes a token with whom changes
which tokens an expert sees together, and must change nothing else."""

from __future__ import annotations

from typing import Any

import pytest
from phasewise.tests.engine.test_exactness import Case
from phasewise.tests.serving.in_process import cluster
from phasewise.tests.serving.test_token_exactness import run, serve_all

NAMES = ["mixtral-window-tied", "qwen3-moe-renormalised-dense-between"]
SPLIT_2_1 = {"prefill_split": (2, 1), "decode_split": (2, 1)}
SPLIT_1_2 = {"prefill_split": (1, 2), "decode_split": (1, 2)}
WAYS: dict[str, dict[str, Any]] = {
    "colocated": {"prefill": 0},
    "pull-tcp": {"mode": "pull", "transport": "tcp"},
    "chunked": {"mode": "push", "max_batch_tokens": 67},
    "tensor-parallel": {"mode": "push"} | SPLIT_2_1,
    "pipeline-parallel": {"mode": "push"} | SPLIT_1_2,
    "colocated-tensor-parallel": {"prefill": 0} | SPLIT_2_1,
}


@pytest.fixture(scope="module", params=NAMES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def expected(case: Case) -> tuple[list[list[int]], list[list[int]]]:
    """Prompts of 1 to 500 tokens, and what follows each."""
    prompts = [*case.prompts, [i * 7 % 131 for i in range(500)]]
    return prompts, [case.generate(prompt) for prompt in prompts]


@pytest.mark.parametrize("way", WAYS)
def test_mixtures_stream_the_reference_tokens_in_every_way(
    way: str, case: Case, expected: tuple[list[list[int]], list[list[int]]]
) -> None:
    run(serve_all(case.directory, *expected, **WAYS[way]))


@pytest.mark.parametrize("mode", ["push", "colocated"])
def test_preempted_requests_of_a_mixture_resume_with_the_same_tokens(mode: str, case: Case) -> None:
    prompts = case.prompts[:4] * 4
    tokens = [case.generate(prompt, 100) for prompt in case.prompts[:4]] * 4
    options: dict[str, Any] = {"prefill": 0} if mode == "colocated" else {"mode": mode}
    block_bytes = 3 * 2 * 2 * 10 * 4 * 16  # layers, K and V, heads, head_dim, float32, tokens

    async def work() -> None:
        sizes = {"num_bytes": 36 * block_bytes, "max_model_len": 520}
        async with cluster(case.directory, **options, **sizes) as running:
            assert await running.generate_all(prompts, max_tokens=100) == tokens
            status = await running.client.status()
            assert await running.leftovers() == {}
        assert sum(worker.preemptions for worker in status.workers) > 0

    run(work())
