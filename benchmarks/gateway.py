"""Output tokens per second and core of the gateway alone.

    python benchmarks/gateway.py [--json] [--streams 128] [--tokens 400]

Fake workers and clients run in processes of their own; the gateway's share is its CPU time.
`router` reads streams in the gateway's process: links, routing and detokenising alone. `grpc`
and `http` add their clients' connections.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import resource
import time
from multiprocessing.connection import Connection

from phasewise.cluster.client import AsyncClient
from phasewise.cluster.gateway import Gateway, GatewaySettings
from phasewise.cluster.proto import phasewise_pb2 as pb
from phasewise.cluster.served_model import ServedModel
from phasewise.tests.cluster.fake_worker import VOCAB, FakeWorker
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

STEP_S = 0.005  # one message for all rows each


def served_model() -> ServedModel:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.decoder = decoders.ByteLevel()
    return ServedModel(name="fake", vocab_size=VOCAB, max_model_len=4096, tokenizer=tokenizer)


def run_workers(pipe: Connection) -> None:
    async def serve() -> None:
        prefill = await FakeWorker("prefill", "prefill-0", step_s=STEP_S).start()
        decode = await FakeWorker("decode", "decode-0", step_s=STEP_S).start()
        pipe.send((prefill.address, decode.address))
        await asyncio.to_thread(pipe.recv)
        await prefill.stop()
        await decode.stop()

    asyncio.run(serve())


def run_clients(pipe: Connection) -> None:
    """Load as told over the pipe: (kind, address, streams, tokens); answers with tokens read."""

    async def grpc_stream(client: AsyncClient, tokens: int) -> int:
        request = client.generate(token_ids=[1, 2, 3], max_tokens=tokens, temperature=0)
        return sum([len(piece.token_ids) async for piece in request])

    async def http_stream(address: str, tokens: int) -> int:
        body = {"prompt": [1, 2, 3], "max_tokens": tokens, "temperature": 0, "stream": True}
        body["stream_options"] = {"include_usage": True}
        data = json.dumps(body).encode()
        host, _, port = address.rpartition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
        writer.write(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
        answer = await reader.read(-1)
        writer.close()
        return int(answer.split(b'"completion_tokens": ')[-1].split(b",")[0])

    async def load(kind: str, address: str, streams: int, tokens: int) -> int:
        if kind == "http":
            return sum(
                await asyncio.gather(*(http_stream(address, tokens) for _ in range(streams)))
            )
        async with AsyncClient(address) as client:
            return sum(await asyncio.gather(*(grpc_stream(client, tokens) for _ in range(streams))))

    while (order := pipe.recv()) is not None:
        pipe.send(asyncio.run(load(*order)))


async def router_load(gateway: Gateway, streams: int, tokens: int) -> int:
    async def one() -> int:
        message = pb.GenerateRequest(token_ids=[1, 2, 3], max_tokens=tokens, temperature=0)
        generation = gateway.router.start(await gateway.admission.admit(message))
        return sum([len(piece.token_ids) async for piece in generation.outputs()])

    return sum(await asyncio.gather(*(one() for _ in range(streams))))


def cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


async def measure(args: argparse.Namespace, workers: Connection, clients: Connection) -> list[dict]:
    settings = GatewaySettings(grpc_address="127.0.0.1:0", http_address="127.0.0.1:0")
    gateway = Gateway(served_model(), settings)
    await gateway.start()
    for address, role in zip(workers.recv(), ("prefill", "decode"), strict=True):
        gateway.add_worker(address, role)
    await gateway.wait_ready(20)
    rows = []
    for kind in ("router", "grpc", "http"):
        began_s, began_cpu_s = time.perf_counter(), cpu_s()
        if kind == "router":
            tokens = await router_load(gateway, args.streams, args.tokens)
        else:
            address = gateway.grpc_address if kind == "grpc" else gateway.http_address
            clients.send((kind, address, args.streams, args.tokens))
            tokens = await asyncio.to_thread(clients.recv)
        took_s, took_cpu_s = time.perf_counter() - began_s, cpu_s() - began_cpu_s
        rows.append(
            {
                "front": kind,
                "streams": args.streams,
                "tokens": tokens,
                "tokens_per_core_s": round(tokens / took_cpu_s),
                "tokens_per_s": round(tokens / took_s),
                "cpu_share": round(took_cpu_s / took_s, 2),
            }
        )
    await gateway.stop()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--streams", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=400)
    args = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    ends, processes = [], []
    for target in (run_workers, run_clients):
        here, there = context.Pipe()
        process = context.Process(target=target, args=(there,), daemon=True)
        process.start()
        ends.append(here)
        processes.append(process)
    rows = asyncio.run(measure(args, *ends))
    for end, process in zip(ends, processes, strict=True):
        end.send(None)
        process.join(10)
    if args.json:
        print(json.dumps(rows))
        return
    for row in rows:
        print(
            f"{row['front']:7} {row['tokens_per_core_s']:8} tokens/s per core"
            f"  ({row['tokens_per_s']} tokens/s at {row['cpu_share']} cores)"
        )


if __name__ == "__main__":
    main()
