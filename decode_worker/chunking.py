"""How many prompt tokens may join a step of running decodes without making them late."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from math import inf

from ..engine.sequence import Sequence
from ..engine.step_time import StepFeatures, StepTime

MIN_CHUNK_TOKENS = 16


class ChunkBudget:
    """One step's room for chunks, cut piece by piece.

    A piece is the largest one with which the step's predicted time stays within `slack_s`, the
    least slack of the running decodes; without a model of step times, all the tokens that are
    left. However small the slack, the step's first piece has `MIN_CHUNK_TOKENS` (or all that
    is asked or left), so a prompt of n tokens at the head takes n / MIN_CHUNK_TOKENS steps at most.
    """

    def __init__(
        self,
        num_tokens: int,
        features: StepFeatures,
        *,
        slack_s: float,
        step_time: StepTime | None,
    ) -> None:
        self.num_tokens = num_tokens  # left
        self._features = features
        self._slack_s = slack_s
        self._step_time = step_time
        self._floor = MIN_CHUNK_TOKENS  # until the first piece is cut

    @property
    def used_up(self) -> bool:
        """Whether not even one token more would be in time."""
        if not self.num_tokens:
            return True
        return not self._floor and self._step_time is not None and not self._in_time(1, 0)

    def cut(self, wanted: int, context: int) -> int:
        """Tokens of the next piece, which stands after `context` computed ones; 0 when used up."""
        most = min(wanted, self.num_tokens)
        least = min(most, self._floor)
        count = self._largest(least, most, context)
        if count:
            self.num_tokens -= count
            self._features = self._features.with_chunk(count, context)
            self._floor = 0
        return count

    def _largest(self, least: int, most: int, context: int) -> int:
        if self._step_time is None or self._in_time(most, context):
            return most
        while least < most - 1:
            middle = (least + most) // 2
            if self._in_time(middle, context):
                least = middle
            else:
                most = middle
        return least

    def _in_time(self, count: int, context: int) -> bool:
        assert self._step_time is not None
        features = self._features.with_chunk(count, context)
        return self._step_time.batch_s(features) <= self._slack_s


def chunks_of(prompts: Iterable[Sequence], budget: ChunkBudget) -> Iterator[tuple[Sequence, int]]:
    """Who joins the step with how many tokens, in the order given; asks for no more than fit."""
    for sequence in prompts:
        wanted = sequence.num_uncomputed
        count = budget.cut(wanted, sequence.num_computed)
        if count:
            yield sequence, count
        if count < wanted or budget.used_up:
            return


def step_budget(
    rows: list[Sequence],
    starts: list[int],
    *,
    num_tokens: int,
    tpot_ms: float,
    step_time: StepTime | None,
) -> ChunkBudget:
    """Room for `num_tokens` of chunks beside decoding rows that name no target but `tpot_ms`.

    Each row got a token in the last step, so its slack is its whole time per token.
    """
    slack_s = inf
    if step_time is not None and rows:
        targets_ms = [row.request.tpot_ms or tpot_ms for row in rows]
        slack_s = min((ms for ms in targets_ms if ms), default=inf) / 1e3
    features = StepFeatures(decode_rows=len(rows), decode_context=sum(starts))
    return ChunkBudget(num_tokens, features, slack_s=slack_s, step_time=step_time)
