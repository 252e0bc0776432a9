"""The latency model learnt while serving, for workers that were given no profile."""

from __future__ import annotations

from .step_time import StepCoefficients, StepFeatures

_FORGET = 0.99  # weight left of a sample after one more of its kind: a memory of about 100
_SWEEPS = 3  # coordinate descent sweeps a sample; the solution is kept warm between samples
_TINY = 1e-100  # a feature with less weight than this keeps the coefficient it had


class OnlineStepTime:
    """Least squares over the steps seen, recent ones more, coefficients never negative.

    Minimises the *relative* error, sum of weight * (predicted / measured - 1)^2. So a step that
    was slow for its own reasons (first use, compilation, a pause of the host) has next to no
    weight, 1 / measured^2, and needs no threshold to be recognised. Steps with and without
    chunks are forgotten at their own pace: a long stretch of decoding does not wear down what
    is known about prefill. Predicts 0 s before the first sample. Is a `StepTime`.
    """

    def __init__(self) -> None:
        self._gram = {kind: [[0.0] * 5 for _ in range(5)] for kind in (False, True)}
        self._moment = {kind: [0.0] * 5 for kind in (False, True)}
        self._solution = [0.0] * 5

    def batch_s(self, features: StepFeatures) -> float:
        base, new_token, attention, row, context = self._solution
        return (
            base
            + new_token * features.new_tokens
            + attention * features.attention
            + row * features.decode_rows
            + context * features.decode_context
        )

    def observe(self, features: StepFeatures, measured_s: float) -> None:
        """Learn from one step. A time that is not positive says nothing and is left out."""
        if measured_s <= 0.0:
            return
        kind = features.new_tokens > 0
        scaled = [value / measured_s for value in (1, *features)]
        gram, moment = self._gram[kind], self._moment[kind]
        for i, value in enumerate(scaled):
            moment[i] = moment[i] * _FORGET + value
            gram[i] = [
                g * _FORGET + value * other for g, other in zip(gram[i], scaled, strict=True)
            ]
        self._solve()

    def coefficients(self) -> StepCoefficients:
        """What has been learnt, frozen."""
        base, new_token, attention, row, context = self._solution
        return StepCoefficients(
            base_s=base,
            new_token_s=new_token,
            attention_s=attention,
            decode_row_s=row,
            decode_context_s=context,
        )

    def _solve(self) -> None:
        """Some sweeps of non-negative coordinate descent on the normal equations."""
        decode, chunks = self._gram[False], self._gram[True]
        gram = [
            [a + b for a, b in zip(*rows, strict=True)] for rows in zip(decode, chunks, strict=True)
        ]
        moment = [a + b for a, b in zip(self._moment[False], self._moment[True], strict=True)]
        solution = self._solution
        for _ in range(_SWEEPS):
            for i, row in enumerate(gram):
                if row[i] < _TINY:
                    continue
                residual = moment[i] - sum(map(float.__mul__, row, solution))
                solution[i] = max(0.0, solution[i] + residual / row[i])
