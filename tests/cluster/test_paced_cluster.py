"""A rehearsal: paced workers under the real router, schedulers, handoffs and transfers."""

from __future__ import annotations

import asyncio
import json
import random
from pathlib import Path

import pytest
from phasewise.cluster.checkpoint import resolve
from phasewise.configs.errors import InvalidConfig
from phasewise.configs.load import load_cluster
from phasewise.configs.schema import PacedConfig
from phasewise.engine.paced import continuation
from phasewise.engine.spec import load_spec
from phasewise.kv_transfer.paced import Lane
from phasewise.placement.latency.step_profile import ProfilePoint, StepProfile, write_profile
from phasewise.tests.serving.in_process import cluster

TINY = Path(__file__).parents[2] / "models" / "tiny"
LOCAL = Path(__file__).parents[2] / "configs" / "local.yaml"
H100 = PacedConfig(hardware="h100", link="network")
PACED = ("prefill.device=paced", "decode.device=paced", "paced.hardware=h100")
LIMIT_S = 60.0


def prompts_and_streams(count: int, tokens: int) -> tuple[list[list[int]], list[list[int]]]:
    spec = load_spec(TINY)
    draw = random.Random(count)
    prompts = [
        [draw.randrange(spec.vocab_size) for _ in range(draw.randrange(1, 300))]
        for _ in range(count)
    ]
    return prompts, [
        continuation(p, tokens, vocab_size=spec.vocab_size, eos_token_ids=spec.eos_token_ids)
        for p in prompts
    ]


@pytest.mark.parametrize("mode", ["push", "pull"])
def test_streams_are_the_reference_through_two_pools(mode: str) -> None:
    prompts, streams = prompts_and_streams(12, 20)

    async def work() -> None:
        async with cluster(TINY, mode=mode, paced=H100, max_batch_tokens=100) as running:
            assert await running.generate_all(prompts, max_tokens=20) == streams
            assert await running.leftovers() == {}

    asyncio.run(asyncio.wait_for(work(), LIMIT_S))


@pytest.mark.parametrize("lost", ["decode-0", "prefill-0"])
def test_streams_stay_exact_when_a_paced_worker_is_lost(lost: str) -> None:
    prompts, streams = prompts_and_streams(6, 700)

    async def work() -> None:
        started = asyncio.Event()
        async with cluster(TINY, prefill=2, decode=2, paced=H100) as running:

            async def stream(prompt: list[int]) -> list[int]:
                tokens: list[int] = []
                outputs = running.client.generate(token_ids=prompt, max_tokens=700, temperature=0)
                async for output in outputs:
                    tokens += output.token_ids
                    if len(tokens) > 50:  # by then every stream has a decode worker
                        started.set()
                return tokens

            async def lose() -> None:
                await started.wait()
                await asyncio.to_thread(running.workers[lost].stop)

            losing = asyncio.create_task(lose())
            assert await asyncio.gather(*(stream(p) for p in prompts)) == streams
            await losing
            status = await running.client.status()
            if lost == "decode-0":
                assert status.gateway.failovers > 0

    asyncio.run(asyncio.wait_for(work(), LIMIT_S))


def test_a_lane_sends_one_thing_after_the_other() -> None:
    now_s, slept = 5.0, []
    lane = Lane(1000.0, clock=lambda: now_s, sleep=slept.append)
    lane.carry(100)
    lane.carry(200)
    now_s = 6.0
    lane.carry(50)
    assert slept == pytest.approx([0.1, 0.3, 0.05])


def test_a_paced_file_needs_only_the_config_of_its_model(tmp_path: Path) -> None:
    big = json.loads((TINY / "config.json").read_text()) | {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 128,
    }
    (tmp_path / "config.json").write_text(json.dumps(big))
    changes = (
        *PACED,
        f"model.path={tmp_path}",
        "model.dtype=bfloat16",
        "kv.memory=64GiB",
        "decode.tensor_parallel=4",
    )
    assert resolve(load_cluster(LOCAL, changes)).model.max_model_len == 2048


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        (("decode.device=paced", "paced.hardware=h100"), "prefill.device"),
        (("paced.hardware=h100",), "paced"),
        (PACED[:2], "paced.hardware"),
        ((*PACED[:2], "paced.link=node", "paced.profile=p.json"), "paced.hardware"),
        ((*PACED, "prefill.threads=2"), "prefill.threads"),
        ((*PACED, "decode.pipeline_parallel=2"), "decode.pipeline_parallel"),
        ((*PACED, "decode.block_size=24"), "decode.block_size"),
        ((*PACED[:2], "paced.hardware=h1000"), "paced.hardware"),
        ((*PACED, "decode.tensor_parallel=3"), "tiny at tensor parallel 3, pipeline parallel 1"),
    ],
)
def test_a_rehearsal_that_cannot_be_is_refused_by_key(changes: tuple[str, ...], key: str) -> None:
    with pytest.raises(InvalidConfig) as caught:
        resolve(load_cluster(LOCAL, changes))
    assert caught.value.where == key


def test_the_profile_of_another_model_is_refused(tmp_path: Path) -> None:
    point = ProfilePoint(
        phase="prefill", tp=1, pp=1, new_tokens=16, context=0, batch=1, seconds=0.1
    )
    profile = StepProfile(hardware="cpu", model="other", dtype="", origin="", points=(point,))
    write_profile(profile, tmp_path / "p.json")
    changes = (*PACED[:2], f"paced.profile={tmp_path / 'p.json'}")
    with pytest.raises(InvalidConfig, match="'other', not 'tiny'"):
        resolve(load_cluster(LOCAL, changes))
