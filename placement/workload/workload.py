"""What the cluster will be asked: arrivals, lengths, classes and shared prefixes as columns.

A `WorkloadSpec` is what a person wrote, `build` makes the requests of one seed from it. Built
columns are read-only, so that simulations can share them. Knows neither torch nor ray.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...engine.errors import InvalidConfig
from . import arrivals
from .lengths import LengthDistribution, fit_lognormal, parse_length
from .section import known_keys, positive
from .traces import FloatColumn, IntColumn, PrefixHashes, Trace, read_trace

LEFT_OUT_DRAWS = 10_000
MOST = 1e9
FULL_REDRAWS, REDRAWS = 100, 10_000
DEFAULT_REQUESTS = 3000  # 300 are noise: five seeds of 300 gave 1.55 to 2.08 req/s for one shape


@dataclass(frozen=True, kw_only=True, slots=True)
class Workload:
    """Requests in order of arrival, one row each. `output_tokens` counts the first token."""

    arrival_s: FloatColumn
    prompt_tokens: IntColumn
    output_tokens: IntColumn
    class_ids: NDArray[np.int16] | None = None  # into class_names; None: all of class 0
    class_names: tuple[str, ...] = ("default",)
    prefix: PrefixHashes | None = None

    def __post_init__(self) -> None:
        n = len(self.arrival_s)
        assert n == len(self.prompt_tokens) == len(self.output_tokens) > 0
        assert np.all(np.diff(self.arrival_s) >= 0), "arrivals are sorted"
        assert self.prompt_tokens.min() >= 1 and self.output_tokens.min() >= 1
        assert self.class_ids is None or len(self.class_ids) == n
        for column in (self.arrival_s, self.prompt_tokens, self.output_tokens, self.class_ids):
            if column is not None:
                column.flags.writeable = False

    @property
    def num_requests(self) -> int:
        return len(self.arrival_s)

    @property
    def rate_rps(self) -> float:
        return arrivals.mean_rate_rps(self.arrival_s)

    def at_rate(self, rate_rps: float) -> Workload:
        """The same requests, arriving faster or slower: one pattern, stretched."""
        return replace(self, arrival_s=arrivals.replay(self.arrival_s, rate_rps))

    def take(self, rows: NDArray[np.int64]) -> Workload:
        """The given rows (ascending) as a workload that starts at 0."""
        arrival_s = self.arrival_s[rows]
        return Workload(
            arrival_s=arrival_s - arrival_s[0],
            prompt_tokens=self.prompt_tokens[rows],
            output_tokens=self.output_tokens[rows],
            class_ids=None if self.class_ids is None else self.class_ids[rows],
            class_names=self.class_names,
            prefix=None if self.prefix is None else self.prefix.take(rows),
        )

    def head(self, num_requests: int) -> Workload:
        return self.take(np.arange(min(num_requests, self.num_requests)))


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkloadSpec:
    """What the `workload` section of a plan file says, checked.

    Lengths come from the trace (rows drawn with replacement, prompt and output kept together;
    `fitted`: two lognormals instead) or from the given distributions.
    """

    process: str = "poisson"  # one of arrivals.PROCESSES
    rate_rps: float | None = None  # None: the trace's own
    cv: float = 1.0  # gamma only
    trace: Trace | None = None
    fitted: bool = False
    prompt: LengthDistribution | None = None
    output: LengthDistribution | None = None
    num_requests: int = DEFAULT_REQUESTS
    max_total_tokens: int | None = None  # longer requests are left out, as a server refuses them
    class_shares: Mapping[str, float] | None = None

    @property
    def class_names(self) -> tuple[str, ...]:
        """That requests may have."""
        if self.class_shares is not None:
            return tuple(self.class_shares)
        return ("default",) if self.trace is None else self.trace.class_names

    @property
    def is_replayed_whole(self) -> bool:
        """Whether all seeds make the same requests: those of the whole trace as it was recorded."""
        if self.process != "trace" or self.class_shares is not None:
            return False
        return self.num_requests >= len(self._fitting_rows())

    @property
    def left_out_share(self) -> float:
        """Of the trace's requests, or of drawn ones before they are drawn again: too long."""
        if self.max_total_tokens is None:
            return 0.0
        if self.trace is not None and self.prompt is None and not self.fitted:
            return 1 - len(self._fitting_rows()) / self.trace.num_requests
        free = replace(self, max_total_tokens=None, process="uniform", rate_rps=1.0)
        drawn = replace(free, num_requests=LEFT_OUT_DRAWS).build(0)
        total = drawn.prompt_tokens.astype(np.int64) + drawn.output_tokens
        return float(np.mean(total > self.max_total_tokens))

    def build(self, seed: int, *, rate_rps: float | None = None) -> Workload:
        """The workload of one seed; the same seed at another rate has the same requests."""
        rng = np.random.default_rng(seed)
        if self.process == "trace":
            workload = self._replayed(rng, rate_rps or self.rate_rps)
        else:
            workload = self._drawn(rng, rate_rps or self.rate_rps)
        if self.class_shares is not None:
            shares = np.array(list(self.class_shares.values()))
            ids = rng.choice(len(shares), workload.num_requests, p=shares / shares.sum())
            names = tuple(self.class_shares)
            workload = replace(workload, class_ids=ids.astype(np.int16), class_names=names)
        return workload

    def _replayed(self, rng: np.random.Generator, rate_rps: float | None) -> Workload:
        """A window of the trace, starting anywhere; the whole when it has no more rows."""
        trace, fits = self.trace, self._fitting_rows()
        assert trace is not None and trace.arrival_s is not None
        count = min(self.num_requests, len(fits))
        start = int(rng.integers(len(fits) - count + 1))
        rows = fits[start : start + count]
        ids, names = _class_column(trace, rows)
        return Workload(
            arrival_s=arrivals.replay(trace.arrival_s[rows], rate_rps),
            prompt_tokens=trace.prompt_tokens[rows],
            output_tokens=trace.output_tokens[rows],
            class_ids=ids,
            class_names=names,
            prefix=None if trace.prefix is None else trace.prefix.take(rows),
        )

    def _drawn(self, rng: np.random.Generator, rate_rps: float | None) -> Workload:
        if rate_rps is None:
            assert self.trace is not None and self.trace.arrival_s is not None
            rate_rps = arrivals.mean_rate_rps(self.trace.arrival_s)
        n = self.num_requests
        match self.process:
            case "poisson":
                arrival_s = arrivals.poisson(n, rate_rps, rng)
            case "gamma":
                arrival_s = arrivals.gamma(n, rate_rps, self.cv, rng)
            case _:
                arrival_s = arrivals.uniform(n, rate_rps)
        if self.prompt is not None and self.output is not None:
            prompt, output = self._distributed(self.prompt, self.output, rng)
            return Workload(arrival_s=arrival_s, prompt_tokens=prompt, output_tokens=output)
        assert self.trace is not None
        if self.fitted:
            rows = self._fitting_rows()
            prompt, output = self._distributed(
                fit_lognormal(self.trace.prompt_tokens[rows]),
                fit_lognormal(self.trace.output_tokens[rows]),
                rng,
            )
            return Workload(arrival_s=arrival_s, prompt_tokens=prompt, output_tokens=output)
        rows = rng.choice(self._fitting_rows(), n)
        ids, names = _class_column(self.trace, rows)
        return Workload(
            arrival_s=arrival_s,
            prompt_tokens=self.trace.prompt_tokens[rows],
            output_tokens=self.trace.output_tokens[rows],
            class_ids=ids,
            class_names=names,
            prefix=None if self.trace.prefix is None else self.trace.prefix.take(rows),
        )

    def _distributed(
        self, prompt: LengthDistribution, output: LengthDistribution, rng: np.random.Generator
    ) -> tuple[IntColumn, IntColumn]:
        """Independent lengths; what is too long in all is drawn again.

        Raises InvalidConfig where hardly any request fits, below one of a thousand.
        """
        n = self.num_requests
        prompts, outputs = prompt.sample(n, rng), output.sample(n, rng)
        if self.max_total_tokens is None:
            return prompts, outputs
        for round in range(REDRAWS):
            total = prompts.astype(np.int64) + outputs
            long = np.flatnonzero(total > self.max_total_tokens)
            if not len(long):
                return prompts, outputs
            if round == FULL_REDRAWS and len(long) == n:
                break
            if round < FULL_REDRAWS:  # of all: a seed's requests hang on it
                again = prompt.sample(n, rng)[long], output.sample(n, rng)[long]
            else:
                again = prompt.sample(len(long), rng), output.sample(len(long), rng)
            prompts[long], outputs[long] = again
        raise self._nothing_fits(int((prompts.astype(np.int64) + outputs).min()))

    def _fitting_rows(self) -> NDArray[np.int64]:
        assert self.trace is not None
        total = self.trace.prompt_tokens.astype(np.int64) + self.trace.output_tokens
        limit = self.max_total_tokens
        rows = np.arange(len(total)) if limit is None else np.flatnonzero(total <= limit)
        if not len(rows):
            raise self._nothing_fits(int(total.min()))
        return rows

    def _nothing_fits(self, shortest: int) -> InvalidConfig:
        limit = self.max_total_tokens
        hold = "no" if limit is None or shortest > limit else "hardly a"
        return InvalidConfig(
            "model.max_model_len, workload.max_total_tokens",
            f"{limit} tokens hold {hold} request, prompt and answer together: the shortest has "
            f"{shortest}",
            "raise the limit or give shorter lengths",
        )


def _class_column(
    trace: Trace, rows: NDArray[np.int64]
) -> tuple[NDArray[np.int16] | None, tuple[str, ...]]:
    if trace.classes is None:
        return None, ("default",)
    names = trace.class_names
    index = {name: i for i, name in enumerate(names)}
    ids = np.array([index[name] for name in trace.classes], dtype=np.int16)
    return ids[rows], names


def parse_workload(
    section: Mapping[str, Any], *, base: Path = Path(), where: str = "workload"
) -> WorkloadSpec:
    """The `workload` section of a plan file; a relative trace path is taken from `base`.

    Raises InvalidConfig with the key path for unknown keys, wrong values and contradictions.
    """
    known = ("trace", "format", "arrivals", "rate_rps", "cv", "lengths", "num_requests")
    known_keys(where, section, (*known, "max_total_tokens", "classes"))
    trace = None
    if section.get("trace") is not None:
        trace = read_trace(base / str(section["trace"]), str(section.get("format", "auto")))
    elif section.get("format") is not None:
        raise InvalidConfig(f"{where}.format", "there is no trace", "give trace: FILE")
    lengths = section.get("lengths", "trace" if trace else None)
    prompt = output = None
    if isinstance(lengths, Mapping):
        known_keys(f"{where}.lengths", lengths, ("prompt", "output"))
        prompt = parse_length(f"{where}.lengths.prompt", lengths.get("prompt"))
        output = parse_length(f"{where}.lengths.output", lengths.get("output"))
    elif lengths not in ("trace", "fitted"):
        raise InvalidConfig(
            f"{where}.lengths", f"{lengths!r} is none", "give {prompt: …, output: …} or a trace"
        )
    timed = trace is not None and trace.arrival_s is not None
    spec = WorkloadSpec(
        process=str(section.get("arrivals", "trace" if timed and prompt is None else "poisson")),
        rate_rps=_number(where, section, "rate_rps"),
        cv=_number(where, section, "cv") or 1.0,
        trace=trace,
        fitted=lengths == "fitted",
        prompt=prompt,
        output=output,
        num_requests=_count(where, section, "num_requests") or DEFAULT_REQUESTS,
        max_total_tokens=_count(where, section, "max_total_tokens"),
        class_shares=_shares(where, section.get("classes")),
    )
    _check(where, spec)
    return spec


def _check(where: str, spec: WorkloadSpec) -> None:
    timed = spec.trace is not None and spec.trace.arrival_s is not None
    if spec.process not in arrivals.PROCESSES:
        raise InvalidConfig(
            f"{where}.arrivals", f"unknown process {spec.process!r}", f"use {arrivals.PROCESSES}"
        )
    if spec.process == "trace" and (not timed or spec.prompt is not None or spec.fitted):
        raise InvalidConfig(
            f"{where}.arrivals",
            "a replay takes arrivals and lengths of one trace that has times",
            "give such a trace without lengths, or another process",
        )
    if spec.process != "gamma" and spec.cv != 1.0:
        raise InvalidConfig(f"{where}.cv", "only gamma arrivals have it", "use arrivals: gamma")
    if spec.rate_rps is None and not timed:
        raise InvalidConfig(
            f"{where}.rate_rps",
            "no rate is given and no trace has one",
            "give requests a second, here or as --rate",
        )
    if spec.prompt is None and spec.trace is None:
        raise InvalidConfig(f"{where}.lengths", "they need a trace", "give trace: FILE")


def _number(where: str, section: Mapping[str, Any], key: str) -> float | None:
    value = section.get(key)
    if value is None:
        return None
    return positive(f"{where}.{key}", value, "write it in digits, as 0.5", below=MOST)


def _count(where: str, section: Mapping[str, Any], key: str) -> int | None:
    value = _number(where, section, key)
    if value is not None and value != int(value):
        raise InvalidConfig(f"{where}.{key}", f"{value!r} is not a whole number", "give one")
    return None if value is None else int(value)


def _shares(where: str, value: Any) -> Mapping[str, float] | None:
    if value is None:
        return None
    if not isinstance(value, Mapping) or not value:
        raise InvalidConfig(f"{where}.classes", f"{value!r}", "give {name: share, …}")
    return {str(name): _number(f"{where}.classes", value, name) or 0.0 for name in value}
