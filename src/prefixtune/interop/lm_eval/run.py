"""lm-eval's evaluation of a model, and the files that lm-eval writes."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lm_eval
from lm_eval.loggers import EvaluationTracker
from lm_eval.utils import handle_non_serializable

from prefixtune.errors import PrefixError
from prefixtune.interop.lm_eval.model import PrefixLM
from prefixtune.interop.lm_eval.tasks import LoadedTasks, without_noise

__all__ = ["Row", "evaluate_tasks", "result_rows"]


@dataclass(frozen=True)
class Row:
    """One figure of a result.

    Attributes:
        task: The task or group, indented under its group.
        filter: What was taken from the answers, in lm-eval's words; `none`: all.
        shots: Solved examples before each question; None: a group's figure.
        metric: Its name.
        value: The figure; None: the row is a group's heading.
        stderr: Its standard error; None: there is none.
    """

    task: str
    filter: str
    shots: int | None
    metric: str
    value: float | str | None
    stderr: float | None


def evaluate_tasks(
    model: PrefixLM,
    tasks: LoadedTasks,
    *,
    names: Mapping[str, Any],
    output: Path | None = None,
    log_samples: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """Measure a model, by lm-eval's `simple_evaluate`.

    Args:
        model: The backbone with its prefixes.
        tasks: What to measure.
        names: What the files say the model is; `model` names its folder.
        output: Write lm-eval's files there: `MODEL/results_DATE.json`, and with `log_samples` a file for each task.
        log_samples: Also write every document with its answers.
        **options: Of `simple_evaluate`, such as `limit` and `num_fewshot`.

    Returns:
        lm-eval's results as plain values.

    Raises:
        PrefixError: The files cannot be written.
    """
    tracker = EvaluationTracker(output_path=None if output is None else str(output))
    with without_noise():
        results: dict[str, Any] = lm_eval.simple_evaluate(
            model=model,
            model_args=dict(names),
            tasks=list(tasks.specs),
            task_manager=tasks.manager,
            batch_size=model.batch_size,
            device=str(model.device),
            log_samples=log_samples,
            evaluation_tracker=tracker,
            **options,
        )
        samples = results.pop("samples", None)
        if output is not None:
            _write(tracker, results, samples, output)
    plain: dict[str, Any] = json.loads(json.dumps(results, default=handle_non_serializable))
    return plain


def _write(
    tracker: EvaluationTracker, results: dict[str, Any], samples: Mapping[str, Any] | None, output: Path
) -> None:
    """Write lm-eval's files, and check that they are there: lm-eval itself goes on without them."""
    before = set(output.rglob("results_*.json"))
    tracker.save_results_aggregated(results=results, samples=samples)
    if not set(output.rglob("results_*.json")) - before:
        raise PrefixError(f"lm-eval could not write its results into {str(output)!r}.", hint="choose another place.")
    for task, rows in (samples or {}).items():
        tracker.save_results_samples(task_name=task, samples=rows)


def result_rows(results: Mapping[str, Any]) -> list[Row]:
    """The figures of a result for a table, those of a group above its tasks'."""
    subtasks = results.get("group_subtasks", {})
    inner = {child for children in subtasks.values() for child in children}
    rows: list[Row] = []

    def add(name: str, depth: int) -> None:
        figures = (results.get("groups", {}) if name in subtasks else results["results"]).get(name, {})
        title = "  " * depth + name
        shots = results.get("n-shot", {}).get(name)
        own = list(_rows(title, shots, figures))
        # A group without figures of its own is a heading.
        rows.extend(own or [Row(title, "", None, "", None, None)])
        for child in subtasks.get(name, ()):
            add(child, depth + 1)

    for name in dict.fromkeys([*subtasks, *results["results"]]):
        if name not in inner:
            add(name, 0)
    return rows


def _rows(title: str, shots: int | None, figures: Mapping[str, Any]) -> Iterator[Row]:
    for key, value in sorted(figures.items()):
        metric, comma, kind = key.partition(",")
        if comma and not metric.endswith("_stderr"):
            error = figures.get(f"{metric}_stderr,{kind}")
            yield Row(title, kind, shots, metric, value, error if isinstance(error, float) else None)
