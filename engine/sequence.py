"""A request while it is being served by one worker. Owned by that worker's scheduler."""

from __future__ import annotations

from .request import FinishReason, Request


class Sequence:
    """Tokens, blocks and progress of one request on one worker.

    Invariants: `0 <= num_computed <= num_tokens`; the KV of positions `[0, num_computed)` is in
    `blocks`, `block_size` positions a block. A sequence is decoding when exactly one known token
    is not computed yet. `tokens` is None in simulation, where only lengths matter; then
    `block_hashes` may be given, one for each full block of the prompt.
    """

    __slots__ = (
        "__weakref__",  # the sampler remembers token counts for as long as a sequence lives
        "block_hashes",
        "blocks",
        "cached_tokens",
        "first_scheduled_s",
        "id",
        "max_total_tokens",
        "num_computed",
        "num_preemptions",
        "num_prompt_tokens",
        "num_tokens",
        "request",
        "tokens",
    )

    def __init__(self, request: Request) -> None:
        self.id = request.id
        self.request = request
        self.tokens: list[int] | None = list(request.token_ids)
        self.num_tokens = request.num_tokens
        self.num_prompt_tokens = request.num_prompt_tokens
        self.max_total_tokens = request.max_total_tokens
        self.num_computed = 0
        self.blocks: list[int] = []
        self.block_hashes: list[int] = []  # names of the first full blocks, made as needed
        self.cached_tokens = 0  # found in the prefix cache when it was first admitted
        self.num_preemptions = 0
        self.first_scheduled_s: float | None = None

    @property
    def num_uncomputed(self) -> int:
        return self.num_tokens - self.num_computed

    @property
    def num_output_tokens(self) -> int:
        return self.num_tokens - self.num_prompt_tokens

    def append(self, token_id: int) -> None:
        """Take the token that a step sampled after the last known one."""
        self.num_tokens += 1
        if self.tokens is not None:
            self.tokens.append(token_id)

    def finish_reason(
        self, token_id: int, *, eos_token_ids: frozenset[int], max_model_len: int
    ) -> FinishReason | None:
        """Why the stream ends now that `token_id` was appended; None when it goes on."""
        sampling = self.request.sampling
        if self.num_output_tokens >= sampling.min_tokens and (
            token_id in sampling.stop_token_ids
            or (token_id in eos_token_ids and not sampling.ignore_eos)
        ):
            return FinishReason.STOP
        if self.num_tokens >= min(self.max_total_tokens, max_model_len):
            return FinishReason.LENGTH
        return None
