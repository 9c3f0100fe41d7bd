"""Metrics: their labels are bounded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from prefixtune.server.metrics import Metrics


def test_metrics_of_prefixes_are_bounded(make_server: Callable[..., Any]) -> None:
    _, state = make_server(metric_prefixes=2)
    metrics = Metrics(state.config, state.worker, state.store, lambda: (0, False))
    for index in range(1000):
        metrics.text_done([f"tenant-{index}"], "stop", 1)
    lines = [line for line in metrics.render().decode().splitlines() if line.startswith("prefixtune_new_tokens_total")]
    assert sorted(lines) == [
        'prefixtune_new_tokens_total{prefix="other"} 998.0',
        'prefixtune_new_tokens_total{prefix="tenant-0"} 1.0',
        'prefixtune_new_tokens_total{prefix="tenant-1"} 1.0',
    ]
