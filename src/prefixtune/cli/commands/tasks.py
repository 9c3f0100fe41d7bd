"""`prefixtune tasks`: list the tasks with their files, decoding, scores and presets."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from prefixtune.cli.common import print_json
from prefixtune.cli.options import CommandOptions, command, json_option
from prefixtune.data import TASKS, Task
from prefixtune.training.presets import PRESETS, preset

__all__ = ["tasks"]


class TasksOptions(CommandOptions):
    """The options of `prefixtune tasks`."""

    as_json: bool = json_option("the tasks, with their presets' values,")


@command
def tasks(options: TasksOptions) -> int:
    """List the tasks: files, decoding, scores, groups, presets."""
    if options.as_json:
        print_json({"tasks": [_as_json(task) for task in TASKS.values()]})
        return 0
    for task in TASKS.values():
        print(f"{task.name}: {task.description}")
        for name, text in _lines(task):
            print(f"  {name:<9} {text}")
    print("presets")
    for name, item in PRESETS.items():
        print(f"  {name}: {item.description}")
    return 0


def _lines(task: Task) -> Iterator[tuple[str, str]]:
    if task.parts:
        yield "files", f"none: it is generated; its parts are {', '.join(task.parts)}"
    else:
        yield "files", f"{' '.join(task.formats)}, each also .gz; folders with a split; sets of the datasets library"
    yield "decoding", ", ".join(f"{name} {json.dumps(value)}" for name, value in task.decoding.items())
    yield "scores", f"{', '.join(task.metrics)} (protocol: {task.protocol})"
    if task.groups:
        yield "groups", ", ".join(task.groups)
    for name, methods in _methods(task).items():
        yield "preset", f"{name}: {', '.join(methods)}"


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
