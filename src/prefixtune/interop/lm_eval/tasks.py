"""lm-eval's tasks by their names, found and loaded before the model is."""

from __future__ import annotations

import contextlib
import fnmatch
import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import datasets
import lm_eval.api.task
import lm_eval.evaluator
from lm_eval.tasks import TaskManager

from prefixtune.errors import ConfigError, DataError, did_you_mean, first_line
from prefixtune.interop.lm_eval.prompting import decoding_config

__all__ = ["LoadedTasks", "check_tasks", "find_tasks", "load_tasks", "prefixes_by_task", "without_noise"]

_MANY = 30
"""Names that a hint may list."""
_MOST_READ = 2**20
"""Characters of a task's file that are looked at."""


@dataclass(frozen=True)
class LoadedTasks:
    """Tasks with their data.

    Attributes:
        manager: lm-eval's index of tasks.
        specs: What `simple_evaluate` takes: tasks, and groups of them.
        tasks: Name -> task, those of groups too.
        members: What was asked for (a task, group or tag) -> the names of its tasks.
    """

    manager: TaskManager
    specs: tuple[Any, ...]
    tasks: Mapping[str, Any]
    members: Mapping[str, tuple[str, ...]]


@contextlib.contextmanager
def without_noise() -> Iterator[None]:
    """While the block runs, lm-eval logs errors alone, and neither it nor `datasets` shows progress.

    Nor does it ask git, which complains outside of a repository, for the version of the folder that it runs in.
    """
    logger = logging.getLogger("lm_eval")
    level, hidden = logger.level, datasets.are_progress_bars_disabled()
    bar, version = lm_eval.api.task.tqdm, lm_eval.evaluator.get_git_commit_hash
    logger.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    lm_eval.api.task.tqdm, lm_eval.evaluator.get_git_commit_hash = (lambda rows, **_: rows), (lambda: None)
    try:
        yield
    finally:
        logger.setLevel(level)
        lm_eval.api.task.tqdm, lm_eval.evaluator.get_git_commit_hash = bar, version
        if not hidden:
            datasets.enable_progress_bars()


def find_tasks(names: Sequence[str], include_path: str | None) -> tuple[TaskManager, list[str]]:
    """lm-eval's index, and the names of tasks, groups and tags, in which `*` and `?` match.

    Where a folder or files of one's own have all of them, lm-eval's thousands are not read, which takes seconds.

    Args:
        names: Names, patterns, or files of tasks in YAML.
        include_path: A folder with further tasks.

    Raises:
        ConfigError: A name is unknown, all of them named at once; or the folder is missing.
    """
    if include_path is not None and not os.path.isdir(include_path):
        raise ConfigError(f"{include_path!r}, with further tasks, is no folder.", hint="check --include-path.")
    own = TaskManager(include_path=include_path, include_defaults=False)
    if all(_is_own(own, name) for name in names):
        return own, list(names)
    manager = TaskManager(include_path=include_path)
    matched = {name: _match(name, manager.all_tasks) for name in names}
    unknown = [name for name, found in matched.items() if not found]
    if unknown:
        hints = dict.fromkeys(_suggest(name, manager.all_tasks) for name in unknown)
        raise ConfigError(f"lm-eval has no task {', '.join(map(repr, unknown))}.", hint=" ".join(hints))
    return manager, list(dict.fromkeys(task for found in matched.values() for task in found))


def _is_own(manager: TaskManager, name: str) -> bool:
    """Whether a manager that knows none of lm-eval's tasks has all that a name means."""
    if name in manager.all_groups:
        config = manager.task_index[name].cfg or {}
        members = config.get("task") or ()
        return isinstance(members, list) and all(isinstance(one, str) and _is_own(manager, one) for one in members)
    return name in manager.all_subtasks or (_is_task_file(name) and "group" not in _head(name))


def _is_task_file(name: str) -> bool:
    return name.endswith((".yaml", ".yml")) and os.path.isfile(name)


def _head(name: str) -> str:
    with open(name, encoding="utf-8", errors="replace") as file:
        return file.read(_MOST_READ)


def _match(name: str, known: Sequence[str]) -> list[str]:
    if name in known or _is_task_file(name):
        return [name]
    return fnmatch.filter(known, name) if set("*?[") & set(name) else []


def _suggest(name: str, known: Sequence[str]) -> str:
    hint = did_you_mean(name, known)
    if hint.startswith("did") or len(known) <= _MANY:
        return hint
    return "`lm-eval ls tasks` lists them; --include-path FOLDER adds own ones."


def load_tasks(manager: TaskManager, names: Sequence[str]) -> LoadedTasks:
    """Tasks with their data, which may come from the Hugging Face hub.

    Raises:
        ConfigError: A task is in two of the groups.
        DataError: A task or its data cannot be read.
    """
    specs: list[Any] = []
    members: dict[str, tuple[str, ...]] = {}
    owner: dict[str, str] = {}
    by_name: dict[str, Any] = {}
    for name in names:
        try:
            with without_noise():
                loaded = manager.load([name])
        except Exception as error:
            reason = first_line(error).rstrip(".")
            raise DataError(
                f"lm-eval cannot load the task {name!r}: {reason}.",
                hint="its data may come from the Hugging Face hub, or need a package: `lm-eval validate` says more.",
            ) from error
        members[name] = tuple(loaded["tasks"])
        for task in members[name]:
            if task in owner:
                raise ConfigError(
                    f"the task {task!r} is in both {owner[task]!r} and {name!r}.", hint="leave one of them out."
                )
            owner[task] = name
        by_name.update(loaded["tasks"])
        groups = loaded.get("groups", {})
        inner = {child for children in loaded.get("group_map", {}).values() for child in children}
        specs += [group for group_name, group in groups.items() if group_name not in inner]
        specs += [task for task_name, task in loaded["tasks"].items() if task_name not in inner]
    return LoadedTasks(manager, tuple(specs), by_name, members)


def check_tasks(tasks: LoadedTasks, *, unsafe_code: bool) -> None:
    """Refuse tasks that a model of text cannot do, or may not.

    Args:
        tasks: Loaded.
        unsafe_code: Tasks may run the code that the model writes.

    Raises:
        ConfigError: One runs code, or shows pictures.
        RequestError: One decodes in a way that is not known here.
    """
    for name, task in tasks.tasks.items():
        if getattr(task, "UNSAFE_CODE", False) and not unsafe_code:
            raise ConfigError(
                f"the task {name!r} runs the code that the model writes.",
                hint="add --confirm-run-unsafe-code, where nothing can be harmed.",
            )
        if getattr(task, "MULTIMODAL", False):
            raise ConfigError(f"the task {name!r} shows pictures or sounds.", hint="choose tasks of text.")
        if task.get_config("output_type") == "generate_until":
            decoding_config(task.get_config("generation_kwargs") or {}, "", 1)


def prefixes_by_task(tasks: LoadedTasks, given: Mapping[str, Any]) -> dict[str, Any]:
    """Task -> its prefix, where `given` may also name groups and tags; a task's own name wins.

    Raises:
        ConfigError: A name is none of the tasks that are measured.
    """
    leaves = set(_flatten(tasks.members.values()))
    unknown = [name for name in given if name not in leaves and name not in tasks.members]
    if unknown:
        known = [*tasks.members, *leaves]
        hints = dict.fromkeys(did_you_mean(name, known) for name in unknown)
        raise ConfigError(
            f"a prefix is given for {', '.join(map(repr, unknown))}, which is not among the tasks.",
            hint=" ".join(hints) if len(known) <= _MANY else "name one of --tasks.",
        )
    by_task = {task: given[name] for name, under in tasks.members.items() if name in given for task in under}
    return {**by_task, **{name: one for name, one in given.items() if name in leaves}}


def _flatten(rows: Iterable[Iterable[str]]) -> list[str]:
    return [name for row in rows for name in row]
