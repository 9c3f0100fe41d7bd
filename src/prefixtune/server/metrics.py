"""Metrics in Prometheus' text format.

Labels are bounded: routes by their patterns, and prefixes by number; the rest count as `other`.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterable, Iterator, Sequence

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4

from prefixtune.engine.base import Engine
from prefixtune.jobs.job import UNFINISHED
from prefixtune.server.models.store import PrefixStore

__all__ = ["CONTENT_TYPE", "Metrics"]


CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4
_OTHER = "other"
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_GAPS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5)


class Metrics:
    """All metrics of a server.

    Args:
        worker: The engine; None: the server has none.
        store: The prefixes.
        num_slots: Texts that run at once.
        max_prefixes: How many prefixes have metrics of their own.
        draining: Whether the server is shutting down.
    """

    def __init__(
        self,
        worker: Engine | None,
        store: PrefixStore,
        *,
        num_slots: int,
        max_prefixes: int,
        draining: Callable[[], bool],
    ) -> None:
        # A creation time for each metric would double the text.
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self._max_labels, self._labels = max_prefixes, set[str]()
        self.registry = registry = CollectorRegistry()
        self.requests = Counter(
            "prefixtune_requests", "Requests by route and status.", ("route", "status"), registry=registry
        )
        self.request_seconds = Histogram(
            "prefixtune_request_seconds", "Duration of requests.", ("route",), buckets=_SECONDS, registry=registry
        )
        self.rejected = Counter(
            "prefixtune_rejected", "Requests refused: no room, or not allowed.", ("reason",), registry=registry
        )
        self._texts = Counter(
            "prefixtune_texts", "Texts generated, by how they ended.", ("prefix", "finished"), registry=registry
        )
        self._prompt_tokens = Counter(
            "prefixtune_prompt_tokens", "Tokens of prompts, without the prefixes'.", ("prefix",), registry=registry
        )
        self._new_tokens = Counter("prefixtune_new_tokens", "Tokens generated.", ("prefix",), registry=registry)
        self._first = Histogram(
            "prefixtune_first_token_seconds", "Time to a text's first token.", buckets=_SECONDS, registry=registry
        )
        self._gap = Histogram(
            "prefixtune_token_gap_seconds", "Time between a text's tokens.", buckets=_GAPS, registry=registry
        )
        self.uploads = Counter(
            "prefixtune_uploads", "Files uploaded for training, by status.", ("status",), registry=registry
        )
        self.jobs_created = Counter("prefixtune_jobs_created", "Training jobs that were asked for.", registry=registry)
        self._jobs = Gauge("prefixtune_jobs", "Training jobs that have not ended.", ("status",), registry=registry)
        self.open_requests = Gauge("prefixtune_open_requests", "Requests being answered.", registry=registry)
        if worker is not None:
            registry.register(_EngineCollector(worker, store, num_slots, draining))
        ProcessCollector(registry=registry)

    def render(self) -> bytes:
        """All metrics, as Prometheus reads them."""
        return generate_latest(self.registry)

    def count_jobs(self, statuses: Iterable[str]) -> None:
        """Record where the jobs stand that have not ended."""
        counts = collections.Counter(statuses)
        for status in UNFINISHED:
            self._jobs.labels(status).set(counts[status])

    def first_token(self, seconds: float) -> None:
        """Record the seconds to a text's first token."""
        self._first.observe(seconds)

    def next_token(self, seconds: float) -> None:
        """Record the seconds between two tokens of a text."""
        self._gap.observe(seconds)

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
        """The model's name, for the first `max_prefixes`: ever new names must not fill the memory."""
        if model not in self._labels:
            if len(self._labels) >= self._max_labels:
                return _OTHER
            self._labels.add(model)
        return model


class _EngineCollector:
    """What the engine and the store count themselves."""

    def __init__(self, worker: Engine, store: PrefixStore, num_slots: int, draining: Callable[[], bool]) -> None:
        self.worker, self.store, self.num_slots, self.draining = worker, store, num_slots, draining

    def describe(self) -> list[Metric]:
        """Nothing beforehand: values are read at each scrape."""
        return []

    def collect(self) -> Iterator[Metric]:
        """The current values."""
        snapshot, cache = self.worker.snapshot(), self.store.stats
        for name, help_text, value in (
            ("slots", "Texts that can run at once.", self.num_slots),
            ("running_texts", "Texts that have a slot: the batch.", len(snapshot.running)),
            ("waiting_texts", "Texts that wait for a slot.", snapshot.waiting),
            ("draining", "1 when the server is shutting down.", self.draining()),
            ("prefixes", "Prefixes that can be requested.", cache.known),
            ("refused_prefixes", "Files that cannot be served.", cache.refused),
            ("cached_prefixes", "Prefixes in memory.", cache.loaded),
            ("cached_prefix_bytes", "Memory of the prefixes in it.", cache.bytes),
        ):
            yield GaugeMetricFamily(f"prefixtune_{name}", help_text, float(value))
        for name, help_text, count in (
            ("steps", "Steps computed.", snapshot.steps),
            ("step_texts", "Texts computed in steps; divided by steps: the mean batch.", snapshot.texts),
            ("prefix_cache_hits", "Requested prefixes that were in memory.", cache.hits),
            ("prefix_cache_misses", "Requested prefixes that had to be read or joined.", cache.misses),
            ("prefix_cache_evictions", "Prefixes removed from memory to make room.", cache.evictions),
        ):
            yield CounterMetricFamily(f"prefixtune_{name}", help_text, float(count))
