"""Figures in Prometheus' text format.

Labels are bounded: routes by their patterns, and prefixes by number, the rest being `other`. Knows nothing of requests.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

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

from prefixtune.engine.worker import EngineWorker
from prefixtune.server.models.store import PrefixStore

__all__ = ["CONTENT_TYPE", "Metrics"]


CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4
_OTHER = "other"
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_GAPS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5)


class Metrics:
    """All figures of a server.

    Args:
        worker: The engine.
        store: The prefixes.
        num_slots: Texts that run at once.
        most_prefixes: How many prefixes have figures of their own.
        draining: Whether the server is about to stop.
    """

    def __init__(
        self,
        worker: EngineWorker,
        store: PrefixStore,
        *,
        num_slots: int,
        most_prefixes: int,
        draining: Callable[[], bool],
    ) -> None:
        # A time of creation for each figure would double the text, and nobody reads them.
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self._most, self._labels = most_prefixes, set[str]()
        self.registry = registry = CollectorRegistry()
        self.requests = Counter(
            "prefixtune_requests", "Requests by route and status.", ("route", "status"), registry=registry
        )
        self.request_seconds = Histogram(
            "prefixtune_request_seconds", "Duration of requests.", ("route",), buckets=_SECONDS, registry=registry
        )
        self.rejected = Counter(
            "prefixtune_rejected", "Requests refused for want of room or rights.", ("reason",), registry=registry
        )
        self._texts = Counter(
            "prefixtune_texts", "Texts written, by how they ended.", ("prefix", "finished"), registry=registry
        )
        self._prompt_tokens = Counter(
            "prefixtune_prompt_tokens", "Tokens of prompts, without the prefixes'.", ("prefix",), registry=registry
        )
        self._new_tokens = Counter("prefixtune_new_tokens", "Tokens written.", ("prefix",), registry=registry)
        self._first = Histogram(
            "prefixtune_first_token_seconds", "Time to a text's first token.", buckets=_SECONDS, registry=registry
        )
        self._gap = Histogram(
            "prefixtune_token_gap_seconds", "Time between a text's tokens.", buckets=_GAPS, registry=registry
        )
        self.open_requests = Gauge("prefixtune_open_requests", "Requests being answered.", registry=registry)
        registry.register(_Engine(worker, store, num_slots, draining))
        ProcessCollector(registry=registry)

    def text(self) -> bytes:
        """The figures, as Prometheus reads them."""
        return generate_latest(self.registry)

    def first_token(self, seconds: float) -> None:
        """A text's first token came after so many seconds."""
        self._first.observe(seconds)

    def next_token(self, seconds: float) -> None:
        """A text's next token came after so many seconds."""
        self._gap.observe(seconds)

    def prompt(self, model: str, tokens: int) -> None:
        """A prompt was read."""
        self._prompt_tokens.labels(self._label(model)).inc(tokens)

    def text_done(self, model: str, finished: str, tokens: int) -> None:
        """A text ended."""
        label = self._label(model)
        self._texts.labels(label, finished).inc()
        self._new_tokens.labels(label).inc(tokens)

    def _label(self, model: str) -> str:
        """The model's name, for the first so many; who asks for ever new names cannot fill the memory."""
        if model not in self._labels:
            if len(self._labels) >= self._most:
                return _OTHER
            self._labels.add(model)
        return model


class _Engine:
    """What the engine and the store count themselves."""

    def __init__(self, worker: EngineWorker, store: PrefixStore, num_slots: int, draining: Callable[[], bool]) -> None:
        self.worker, self.store, self.num_slots, self.draining = worker, store, num_slots, draining

    def describe(self) -> list[Metric]:
        """Nothing beforehand: figures are read when they are asked for."""
        return []

    def collect(self) -> Iterator[Metric]:
        """The figures of this moment."""
        now, cache = self.worker.snapshot(), self.store.stats
        for name, text, value in (
            ("slots", "Texts that can run at once.", self.num_slots),
            ("running_texts", "Texts that have a slot: the batch.", len(now.running)),
            ("waiting_texts", "Texts that wait for a slot.", now.waiting),
            ("draining", "1 when the server is about to stop.", self.draining()),
            ("prefixes", "Prefixes that can be asked for.", cache.known),
            ("refused_prefixes", "Files that cannot be served.", cache.refused),
            ("cached_prefixes", "Prefixes in memory.", cache.loaded),
            ("cached_prefix_bytes", "Memory of the prefixes in it.", cache.bytes),
        ):
            yield GaugeMetricFamily(f"prefixtune_{name}", text, float(value))
        for name, text, count in (
            ("steps", "Steps computed.", now.steps),
            ("step_texts", "Texts computed in steps; over steps: the mean batch.", _texts(now.batch_sizes)),
            ("engine_restarts", "How often the engine broke and was made anew.", now.restarts),
            ("prefix_cache_hits", "Prefixes asked for that were in memory.", cache.hits),
            ("prefix_cache_misses", "Prefixes asked for that had to be read.", cache.misses),
            ("prefix_cache_evictions", "Prefixes that had to make room.", cache.evictions),
        ):
            yield CounterMetricFamily(f"prefixtune_{name}", text, float(count))


def _texts(batch_sizes: Mapping[int, int]) -> int:
    return sum(size * steps for size, steps in batch_sizes.items())
