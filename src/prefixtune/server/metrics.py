"""Metrics in Prometheus' text format.

Labels are bounded: routes by their patterns, and prefixes by number; the rest count as `other`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4

from prefixtune.engine.base import Engine
from prefixtune.server.prefixes import PrefixFolder
from prefixtune.server.settings import ServeConfig

CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4
_OTHER, _MOST_LABELS = "other", 100
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_GAPS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5)


class Metrics:
    """All metrics of a server.

    Args:
        config: The server's configuration.
        worker: The engine; None: the server has none.
        store: The prefixes.
    """

    def __init__(self, config: ServeConfig, worker: Engine | None, store: PrefixFolder) -> None:
        # A creation time for each metric would double the text.
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self._labels = set[str]()
        self.registry = registry = CollectorRegistry()

        def counter(name: str, help_text: str, *labels: str) -> Counter:
            return Counter(f"prefixtune_{name}", help_text, labels, registry=registry)

        def histogram(name: str, help_text: str, *labels: str, buckets: Sequence[float] = _SECONDS) -> Histogram:
            return Histogram(f"prefixtune_{name}", help_text, labels, buckets=buckets, registry=registry)

        self._requests = counter("requests", "Requests by route and status.", "route", "status")
        self._request_seconds = histogram("request_seconds", "Duration of requests.", "route")
        self.rejected = counter("rejected", "Requests refused: no room, or not allowed.", "reason")
        self._texts = counter("texts", "Texts generated, by how they ended.", "prefix", "finished")
        self._prompt_tokens = counter("prompt_tokens", "Tokens of prompts, without the prefixes'.", "prefix")
        self._new_tokens = counter("new_tokens", "Tokens generated.", "prefix")
        self._first = histogram("first_token_seconds", "Time to a text's first token.")
        self._gap = histogram("token_gap_seconds", "Time between a text's tokens.", buckets=_GAPS)
        self.num_slots, self.worker, self.store = config.num_slots, worker, store
        registry.register(self)
        ProcessCollector(registry=registry)

    def render(self) -> bytes:
        """All metrics, as Prometheus reads them."""
        return generate_latest(self.registry)

    def request_done(self, route: str, status: int, seconds: float) -> None:
        """Record a request that was answered."""
        self._requests.labels(route, status).inc()
        self._request_seconds.labels(route).observe(seconds)

    def token(self, seconds: float, *, first: bool) -> None:
        """Record the seconds to a text's first token, or between two of its tokens."""
        (self._first if first else self._gap).observe(seconds)

    def prompt(self, models: Sequence[str], tokens: int) -> None:
        """Record a prompt, for each of the prefixes that are joined for it."""
        for model in models:
            self._prompt_tokens.labels(self._label(model)).inc(tokens)

    def text_done(self, models: Sequence[str], finish_reason: str, tokens: int) -> None:
        """Record the end of a text, for each of the prefixes that are joined for it."""
        for label in map(self._label, models):
            self._texts.labels(label, finish_reason).inc()
            self._new_tokens.labels(label).inc(tokens)

    def _label(self, model: str) -> str:
        """The model's name, for the first hundred: ever new names must not fill the memory."""
        if model not in self._labels:
            if len(self._labels) >= _MOST_LABELS:
                return _OTHER
            self._labels.add(model)
        return model

    # --- what the server, the engine and the folder of prefixes count themselves ---

    def describe(self) -> list[Metric]:
        """Nothing beforehand: values are read at each scrape."""
        return []

    def collect(self) -> Iterator[Metric]:
        """The current values."""
        store = self.store
        gauges: list[tuple[str, str, float]] = [
            ("refused_prefixes", "Files that cannot be served.", store.num_refused),
            ("stale_prefixes", "Prefixes in memory whose files cannot be served now.", store.num_stale),
            ("cached_prefixes", "Prefixes in memory.", store.num_loaded),
            ("cached_prefix_bytes", "Memory of the prefixes in it.", store.num_bytes),
        ]
        counters: list[tuple[str, str, float]] = [
            ("prefix_cache_hits", "Requested prefixes that were in memory.", store.hits),
            ("prefix_cache_misses", "Requested prefixes that had to be read or joined.", store.misses),
        ]
        if self.worker is not None:
            snapshot = self.worker.snapshot()
            gauges += [
                ("slots", "Texts that can run at once.", self.num_slots),
                ("running_texts", "Texts that have a slot: the batch.", len(snapshot.running)),
                ("waiting_texts", "Texts that wait for a slot.", snapshot.waiting),
            ]
            counters += [
                ("steps", "Steps computed.", snapshot.steps),
                ("step_texts", "Texts computed in steps; divided by steps: the mean batch.", snapshot.texts),
            ]
        for name, help_text, value in gauges:
            yield GaugeMetricFamily(f"prefixtune_{name}", help_text, float(value))
        for name, help_text, value in counters:
            yield CounterMetricFamily(f"prefixtune_{name}", help_text, float(value))
