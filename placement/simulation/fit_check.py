"""Whether a deployment can hold what a workload asks, said before anything is simulated."""

from __future__ import annotations

from ...engine.errors import InvalidConfig
from ..workload.workload import Workload
from .deployment import Deployment


def check_fit(deployment: Deployment, workload: Workload) -> None:
    """Refuse what live admission refuses: a request that some worker could never hold."""
    room = min(
        [
            worker.num_blocks // worker.latency.pipeline_parallel * deployment.block_size
            for worker in deployment.decode
        ]
    )
    prompt_room = min(
        [worker.num_blocks * deployment.block_size for worker in deployment.prefill], default=room
    )
    totals = workload.prompt_tokens.astype("int64") + workload.output_tokens
    for tokens, limit, what in (
        (totals, deployment.max_model_len, "max_model_len"),
        (totals, room, "a decode worker's KV pool"),
        (workload.prompt_tokens, prompt_room, "a prefill worker's KV pool"),
    ):
        longest = int(tokens.argmax())
        if tokens[longest] > limit:
            raise InvalidConfig(
                f"workload request {longest}",
                f"{int(tokens[longest])} tokens exceed the {limit} of {what}",
                "leave such requests out (workload.max_total_tokens) or give more KV memory",
            )
