"""The OpenAI-style HTTP front door."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import httpx
import pytest
from phasewise.cluster.gateway import Gateway
from phasewise.cluster.proto import worker_pb2 as worker
from phasewise.cluster.served_model import ServedModel, load_served_model
from phasewise.engine.errors import InvalidConfig
from phasewise.tests.cluster.fake_worker import VOCAB, Run, Serving, expected
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'bad' %}{{ raise_exception('role') }}{% endif %}"
    "<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def byte_tokenizer() -> Tokenizer:
    """One token a byte, so that a text's tokens are its bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


SERVED = ServedModel(
    name="fake",
    vocab_size=VOCAB,
    max_model_len=512,
    tokenizer=byte_tokenizer(),
    chat_template=TEMPLATE,
)


def events(text: str) -> list:
    data = [line.removeprefix("data: ") for line in text.splitlines() if line]
    return [d if d == "[DONE]" else json.loads(d) for d in data]


def client_of(gateway: Gateway) -> httpx.AsyncClient:
    return httpx.AsyncClient(base_url=f"http://{gateway.http_address}", timeout=30)


def test_completion_has_text_usage_and_timings(run: Run, serving: Serving) -> None:
    async def scenario() -> None:
        async with serving(http=True, served=SERVED) as (gateway, *_), client_of(gateway) as http:
            prompt = list(SERVED.encode("Hi"))
            body = {"prompt": "Hi", "max_tokens": 5, "return_token_ids": True, "logprobs": 1}
            answer = (await http.post("/v1/completions", json=body)).json()
            choice = answer["choices"][0]
            assert choice["token_ids"] == expected(prompt, 5)
            assert choice["text"] == SERVED.tokenizer.decode(expected(prompt, 5))
            assert choice["finish_reason"] == "length"
            assert choice["logprobs"]["token_logprobs"] == [-0.5] * 5
            assert answer["usage"]["total_tokens"] == 7
            assert answer["timings"][0]["workers"]

    run(scenario())


def test_streamed_completion_ends_with_usage_and_done(run: Run, serving: Serving) -> None:
    async def scenario() -> None:
        async with serving(http=True, served=SERVED) as (gateway, *_), client_of(gateway) as http:
            body = {
                "prompt": [1, 2],
                "max_tokens": 20,
                "stream": True,
                "stream_options": {"include_usage": True},
            }
            got = events((await http.post("/v1/completions", json=body)).text)
            assert got[-1] == "[DONE]"
            assert got[-2]["usage"]["completion_tokens"] == 20 and got[-2]["choices"] == []
            text = "".join(e["choices"][0]["text"] for e in got[:-2])
            assert text == SERVED.tokenizer.decode(expected([1, 2], 20))
            assert got[-3]["choices"][0]["finish_reason"] == "length"

    run(scenario())


@pytest.mark.parametrize("stream", [False, True])
def test_chat_goes_through_the_checkpoints_template(
    run: Run, serving: Serving, stream: bool
) -> None:
    async def scenario() -> None:
        async with serving(http=True, served=SERVED) as (gateway, prefills, _):
            body = {
                "messages": [{"role": "user", "content": [{"type": "text", "text": "Yo"}]}],
                "max_completion_tokens": 4,
                "stream": stream,
            }
            async with client_of(gateway) as http:
                answer = await http.post("/v1/chat/completions", json=body)
            prompt = list(SERVED.encode("<user>Yo<assistant>"))
            assert list(prefills[0].submits[0].request.token_ids) == prompt
            text = SERVED.tokenizer.decode(expected(prompt, 4))
            if stream:
                deltas = [e["choices"][0]["delta"] for e in events(answer.text)[:-1]]
                assert deltas[0]["role"] == "assistant"
                assert "".join(d["content"] for d in deltas) == text
            else:
                assert answer.json()["choices"][0]["message"]["content"] == text

    run(scenario())


def test_stop_string_ends_the_stream_and_is_not_part_of_the_text(
    run: Run, serving: Serving
) -> None:
    async def scenario() -> None:
        async with serving(http=True, served=SERVED) as (gateway, prefills, decodes):
            prompt = [65]
            whole = SERVED.tokenizer.decode(expected(prompt, 60))
            stop = next(c for c in whole[5:] if c.isascii())
            body = {"prompt": prompt, "max_tokens": 60, "stop": stop}
            async with client_of(gateway) as http:
                answer = (await http.post("/v1/completions", json=body)).json()
            assert answer["choices"][0]["text"] == whole[: whole.index(stop)]
            assert answer["choices"][0]["finish_reason"] == "stop"
            async with asyncio.timeout(30):
                while decodes[0].rows or gateway.router.in_flight:
                    await asyncio.sleep(0.005)

    run(scenario())


BAD_BODIES: list[tuple[str, Any]] = [
    ("temprature", {"prompt": "a", "temprature": 0}),
    ("temperature", {"prompt": "a", "temperature": "hot"}),
    ("temperature", {"prompt": "a", "temperature": -1}),
    ("max_tokens", {"prompt": "a", "max_tokens": True}),
    ("max_tokens", {"prompt": "a", "max_tokens": 1.5}),
    ("prompt", {"prompt": ["a", "b"]}),
    ("prompt", {"prompt": ""}),
    ("prompt", {}),
    ("model", {"prompt": "a", "model": "other"}),
    ("echo", {"prompt": "a", "echo": True}),
    ("stop", {"prompt": "a", "stop": 3}),
    ("logit_bias", {"prompt": "a", "logit_bias": {"x": 1}}),
    ("logit_bias", {"prompt": "a", "logit_bias": {"1": 10**400}}),
    ("temperature", {"prompt": "a", "temperature": 10**400}),
    ("stream_options", {"prompt": "a", "stream_options": 1}),
    ("stream", {"prompt": "a", "stream": "yes"}),
    ("body", [1]),
]
NO_JSON_OR_NO_TEXT = [b'{"prompt": "\\ud800"}', b"[" * 200_000, b'{"prompt": "']


def test_bad_body_is_a_400_that_names_the_parameter(run: Run, serving: Serving) -> None:
    async def scenario() -> None:
        async with serving(http=True, served=SERVED) as (gateway, *_), client_of(gateway) as http:
            for param, body in BAD_BODIES:
                answer = await http.post("/v1/completions", json=body)
                assert answer.status_code == 400, body
                assert answer.json()["error"]["param"] == param, body

    run(scenario())


def test_body_that_is_no_json_or_no_text_is_a_400(run: Run, serving: Serving) -> None:
    async def scenario() -> None:
        async with serving(http=True, served=SERVED) as (gateway, *_), client_of(gateway) as http:
            for body in NO_JSON_OR_NO_TEXT:
                answer = await http.post("/v1/completions", content=body)
                assert answer.status_code == 400, body[:20]
                assert answer.json()["error"]["param"] == "body", body[:20]

    run(scenario())


def test_messages_that_the_template_refuses_are_a_400(run: Run, serving: Serving) -> None:
    async def scenario() -> None:
        async with serving(http=True, served=SERVED) as (gateway, *_), client_of(gateway) as http:
            for messages in ([], [{"role": "bad", "content": "x"}], [{"content": "x"}], "x"):
                answer = await http.post("/v1/chat/completions", json={"messages": messages})
                assert answer.status_code == 400, messages
                assert answer.json()["error"]["param"].startswith("messages")

    run(scenario())


def test_error_before_the_first_token_has_a_status_and_a_delay(run: Run, serving: Serving) -> None:
    async def scenario() -> None:
        async with serving(http=True, served=SERVED) as (gateway, _, decodes):
            full = worker.Failed(code=worker.Failed.OVERLOADED, reason="full", retry_after_s=3)
            decodes[0].fail_next = [full]
            async with client_of(gateway) as http:
                await gateway.drain(1)
                answer = await http.post("/v1/completions", json={"prompt": "a", "stream": True})
                assert answer.status_code == 503 and int(answer.headers["retry-after"]) >= 1
                assert (await http.get("/health")).status_code == 503

    run(scenario())


def test_error_after_the_first_token_is_an_event_and_the_stream_ends_without_done(
    run: Run, serving: Serving
) -> None:
    async def scenario() -> None:
        async with serving(http=True, served=SERVED) as (gateway, _, decodes):
            decodes[0].stop_after = 3
            async with client_of(gateway) as http:
                body = {"prompt": "a", "max_tokens": 400, "stream": True}
                got = events((await http.post("/v1/completions", json=body)).text)
            assert got[-1]["error"]["type"] == "Unavailable" and got[-1]["error"]["code"] == 503
            assert "[DONE]" not in got

    run(scenario())


@pytest.mark.parametrize("stream", [False, True])
def test_http_client_that_goes_away_cancels(run: Run, serving: Serving, stream: bool) -> None:
    async def scenario() -> None:
        async with serving(http=True, served=SERVED) as (gateway, _, decodes):
            decodes[0].stalled = not stream
            body = {"prompt": "a", "max_tokens": 500, "stream": stream}
            async with client_of(gateway) as http:
                pending = asyncio.create_task(http.post("/v1/completions", json=body))
                while not decodes[0].rows:
                    await asyncio.sleep(0.005)
                pending.cancel()
            decodes[0].stalled = False
            async with asyncio.timeout(30):
                while not gateway.metrics.ended["Cancelled"] or gateway.router.in_flight:
                    await asyncio.sleep(0.005)

    run(scenario())


def test_streaming_client_that_goes_away_before_the_first_token_cancels(
    run: Run, serving: Serving
) -> None:
    async def scenario() -> None:
        async with serving(http=True, served=SERVED) as (gateway, prefills, _):
            prefills[0].stalled = True
            async with client_of(gateway) as http:
                body = {"prompt": "a", "stream": True}
                pending = asyncio.create_task(http.post("/v1/completions", json=body))
                while not prefills[0].rows:
                    await asyncio.sleep(0.005)
                pending.cancel()
            async with asyncio.timeout(30):
                while not gateway.metrics.ended["Cancelled"]:
                    await asyncio.sleep(0.005)

    run(scenario())


def test_models_health_and_metrics_answer(run: Run, serving: Serving) -> None:
    async def scenario() -> None:
        async with serving(http=True, served=SERVED) as (gateway, *_), client_of(gateway) as http:
            assert (await http.get("/v1/models")).json()["data"][0]["id"] == "fake"
            assert (await http.get("/health")).status_code == 200
            await http.post("/v1/completions", json={"prompt": "a", "max_tokens": 2})
            text = (await http.get("/metrics")).text
            assert 'phasewise_requests_total{outcome="length"} 1.0' in text
            assert (
                'phasewise_worker_blocks{role="decode",state="free",worker="decode-0"} 64' in text
            )
            assert "phasewise_ttft_seconds_count 1.0" in text

    run(scenario())


def test_served_model_is_read_from_a_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"vocab_size": 256, "eos_token_id": [1, 2]}')
    served = load_served_model(tmp_path, name="m", max_model_len=64)
    assert served.tokenizer is None and served.eos_token_ids == {1, 2}
    byte_tokenizer().save(str(tmp_path / "tokenizer.json"))
    settings = {"chat_template": TEMPLATE, "eos_token": {"content": "</s>"}, "add_bos_token": True}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    served = load_served_model(tmp_path, name="m", max_model_len=64)
    assert served.encode("é") and served.chat_template == TEMPLATE
    assert served.template_tokens == {"eos_token": "</s>"}
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(InvalidConfig, match=r"tokenizer\.json"):
        load_served_model(tmp_path, name="m", max_model_len=64)
