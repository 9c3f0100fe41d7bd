"""The list of tasks, with their files, decoding, scores and presets: `prefixtune data --tasks`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from prefixtune.cli.show import show
from prefixtune.data import TASKS, Task
from prefixtune.training.presets import PRESETS, preset

__all__ = ["show_tasks"]


def show_tasks(as_json: bool) -> int:
    """Print the tasks and the presets; returns the exit code."""
    lines = [f"{task.name}: {task.description}\n" + "\n".join(_lines(task)) for task in TASKS.values()]
    lines += ["presets", *(f"  {name}: {item.description}" for name, item in PRESETS.items())]
    show({"tasks": [_as_json(task) for task in TASKS.values()]}, *lines, as_json=as_json)
    return 0


def _lines(task: Task) -> Iterator[str]:
    if task.parts:
        yield f"  files     none: it is generated; its parts are {', '.join(task.parts)}"
    else:
        yield f"  files     {' '.join(task.formats)}, each also .gz; folders with a split; sets of the datasets library"
    yield f"  decoding  {', '.join(f'{name} {json.dumps(value)}' for name, value in task.decoding.items())}"
    yield f"  scores    {', '.join(task.metrics)} (protocol: {task.protocol})"
    if task.groups:
        yield f"  groups    {', '.join(task.groups)}"
    for name, methods in _methods(task).items():
        yield f"  preset    {name}: {', '.join(methods)}"


def _methods(task: Task) -> dict[str, list[str]]:
    """Preset -> the methods that it has values for."""
    return {name: list(item.runs[task.name]) for name, item in PRESETS.items() if task.name in item.runs}


def _as_json(task: Task) -> dict[str, Any]:
    return {
        "name": task.name,
        "description": task.description,
        "kind": task.kind,
        "formats": [] if task.parts else list(task.formats),
        "parts": list(task.parts),
        "takes_columns": task.takes_columns,
        "decoding": task.decoding,
        "metrics": list(task.metrics),
        "protocol": task.protocol,
        "groups": list(task.groups),
        "presets": {
            name: {method: preset(name, task.name, method) for method in methods}
            for name, methods in _methods(task).items()
        },
    }
