"""What Prometheus reads at /metrics."""

from collections.abc import Callable, Iterator, Sequence

from prometheus_client import (
    CollectorRegistry,
    Counter,
    GCCollector,
    Histogram,
    PlatformCollector,
    ProcessCollector,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from tilewright.types import ModelStats

SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60, 120, 300)

GAUGES = {
    "num_waiting": ("requests_waiting", "Texts that wait for their turn, or were preempted"),
    "num_running": ("requests_running", "Texts that are generated"),
    "used_pages": ("kv_cache_used_pages", "Pages of the KV cache that requests hold"),
    "cached_pages": ("kv_cache_cached_pages", "Pages that no request holds, of known content"),
    "total_pages": ("kv_cache_total_pages", "Pages of the KV cache"),
}
COUNTERS = {
    "num_requests": ("texts", "Texts that were accepted"),
    "num_steps": ("steps", "Steps of the executor"),
    "num_preemptions": ("preemptions", "How often a text gave up its pages to others"),
    "num_prompt_tokens": ("prompt_tokens", "Tokens of prompts"),
    "num_cached_tokens": ("cached_tokens", "Tokens of prompts that were in the KV cache"),
    "num_new_tokens": ("generated_tokens", "Generated tokens"),
    "num_drafted_tokens": ("drafted_tokens", "Tokens that were guessed and checked"),
    "num_accepted_tokens": ("accepted_tokens", "Guessed tokens that were right"),
}
"""Fields of ModelStats: the name of the metric after ``tilewright_``, and what it counts."""


class Metrics:
    """The metrics of one server, in a registry of their own."""

    def __init__(self, stats: Callable[[], Sequence[ModelStats]]):
        """stats: of the models, now."""
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        PlatformCollector(registry=registry)
        GCCollector(registry=registry)
        registry.register(_Engines(stats))
        self.requests = Counter(
            "tilewright_http_requests",
            "HTTP requests that were answered",
            ["method", "path", "status"],
            registry=registry,
        )
        self.failures = Counter(
            "tilewright_executor_failures", "Failures of executors", ["model"], registry=registry
        )

        def histogram(name: str, what: str) -> Histogram:
            return Histogram(
                f"tilewright_{name}", what, ["model"], buckets=SECONDS, registry=registry
            )

        self.first = histogram(
            "time_to_first_token_seconds", "From a request's acceptance to its first token"
        )
        self.between = histogram(
            "time_between_tokens_seconds", "Between tokens of a request, as its reader took them"
        )
        self.durations = histogram(
            "generation_seconds", "From a request's acceptance to its last token"
        )

    def tokens(self, model: str, count: int, seconds: float, first: bool) -> None:
        """Note new tokens of a request, which came together so long after those before them."""
        if first:
            self.first.labels(model).observe(seconds)
        elif count:
            self.between.labels(model).observe(seconds / count)


class _Engines(Collector):
    """Reads what engines count when Prometheus asks, so that a step pays nothing for it."""

    def __init__(self, stats: Callable[[], Sequence[ModelStats]]):
        self._stats = stats

    def collect(self) -> Iterator[Metric]:
        found = self._stats()
        for family, names in ((GaugeMetricFamily, GAUGES), (CounterMetricFamily, COUNTERS)):
            for field, (name, what) in names.items():
                metric = family(f"tilewright_{name}", what, labels=["model"])
                for stats in found:
                    metric.add_metric([stats.model_id], getattr(stats, field))
                yield metric
