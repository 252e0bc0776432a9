"""What the gateway counts, for Prometheus and for `status`. One instance a gateway."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client import Counter as PrometheusCounter
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from .fleet import Fleet, WorkerState
from .output import Timings, Usage

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
PREFIX_COUNTERS = {
    "hit_tokens": "Tokens that the prefix cache saved computing",
    "asked_tokens": "Tokens of prompts and preempted sequences that came to be computed",
}
WORKER_GAUGES = ("running", "waiting", "queued_tokens", "context_tokens", "leases", "step_age_s")
BLOCK_STATES = ("free", "active", "cached", "leased")


class Metrics:
    """Counters of streams; gauges of workers are read from the fleet when they are asked for."""

    def __init__(self, fleet: Fleet) -> None:
        self.registry = CollectorRegistry()
        self.ended: Counter[str] = Counter()
        self.output_tokens = self.failovers = self.local_prefills = 0
        self._ended = self._counter("requests", "Streams ended, by outcome", ("outcome",))
        self._output = self._counter("output_tokens", "Tokens delivered to clients")
        self._cached = self._counter("cached_tokens", "Prompt tokens found in a prefix cache")
        self._prompt = self._counter("prompt_tokens", "Prompt tokens of streams that ended well")
        self._failovers = self._counter("failovers", "Streams continued elsewhere", ("cause",))
        self._local = self._counter(
            "local_prefills", "Prompts computed on a decode worker", ("cause",)
        )
        self._ttft = self._histogram("ttft", "Arrival to first token")
        self._tpot = self._histogram("tpot", "Mean time per token after the first")
        self._e2e = self._histogram("e2e", "Arrival to end")
        self.registry.register(_FleetCollector(fleet))

    def _counter(self, name: str, text: str, labels: tuple[str, ...] = ()) -> PrometheusCounter:
        return PrometheusCounter(f"phasewise_{name}", text, labels, registry=self.registry)

    def _histogram(self, name: str, text: str) -> Histogram:
        return Histogram(f"phasewise_{name}_seconds", text, registry=self.registry, buckets=SECONDS)

    def count_end(self, outcome: str, usage: Usage, timings: Timings) -> None:
        """A stream's one end. Latencies count only where there was a token."""
        self.ended[outcome] += 1
        self._ended.labels(outcome).inc()
        self.output_tokens += usage.completion_tokens
        self._output.inc(usage.completion_tokens)
        if usage.completion_tokens:
            self._ttft.observe(timings.ttft_ms / 1e3)
            self._prompt.inc(usage.prompt_tokens)
            self._cached.inc(usage.cached_tokens)
            self._e2e.observe(timings.e2e_ms / 1e3)
        if usage.completion_tokens > 1:
            self._tpot.observe(timings.tpot_ms / 1e3)

    def count_failover(self, cause: str) -> None:
        self.failovers += 1
        self._failovers.labels(cause).inc()

    def count_local_prefill(self, cause: str) -> None:
        self.local_prefills += 1
        self._local.labels(cause).inc()

    def exposition(self) -> bytes:
        """Prometheus text format."""
        return generate_latest(self.registry)


class _FleetCollector:
    """Gauges of every worker, from its last heartbeat."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet

    def collect(self) -> Iterable[Metric]:
        labels = ("worker", "role")
        up = GaugeMetricFamily("phasewise_worker_up", "1 while ready", labels=labels)
        slots = GaugeMetricFamily("phasewise_worker_open_slots", "Open slots", labels=labels)
        blocks = GaugeMetricFamily(
            "phasewise_worker_blocks", "KV blocks, by state", labels=(*labels, "state")
        )
        loads = {
            name: GaugeMetricFamily(f"phasewise_worker_{name}", f"Load: {name}", labels=labels)
            for name in WORKER_GAUGES
        }
        counters = {
            name: CounterMetricFamily(f"phasewise_worker_prefix_{name}", text, labels=labels)
            for name, text in PREFIX_COUNTERS.items()
        }
        for worker in self._fleet.workers:
            who = (worker.name, worker.role)
            up.add_metric(who, float(worker.state == WorkerState.READY))
            if worker.link is None:
                continue
            slots.add_metric(who, worker.link.num_slots)
            for state in BLOCK_STATES:
                blocks.add_metric((*who, state), getattr(worker.link.load.blocks, state))
            for name, family in loads.items():
                family.add_metric(who, getattr(worker.link.load, name))
            for name, family in counters.items():
                family.add_metric(who, getattr(worker.link.load, name))
        return (up, slots, blocks, *loads.values(), *counters.values())
