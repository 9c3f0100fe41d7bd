"""`prefixtune lm-eval`: measure a backbone with prefixes on lm-eval's tasks."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, field_validator

from prefixtune.cli.common import print_json
from prefixtune.cli.decoding import BackboneOptions
from prefixtune.cli.loading import load_with_prefixes, read_prefix
from prefixtune.cli.options import OutputOptions, command, json_option
from prefixtune.errors import ConfigError, check_all
from prefixtune.utils.config import CommaList, TextList
from prefixtune.utils.console import Console
from prefixtune.utils.extras import needs_extra

if TYPE_CHECKING:
    from prefixtune.interop.lm_eval.tasks import LoadedTasks
    from prefixtune.prefix.prefix import Prefix

__all__ = ["lm_eval"]


class LmEvalOptions(BackboneOptions, OutputOptions):
    """The options of `prefixtune lm-eval`."""

    tasks: CommaList[str] = Field(
        description="lm-eval's tasks, groups or tags, with * and ? as wildcards, or a task's YAML file",
        json_schema_extra={"metavar": "NAMES"},
    )
    prefix: TextList = Field(
        (),
        description="a file, the folder of its run, or hub:OWNER/NAME, for all tasks; TASK=FILE: for one task or "
        "group; A+B joins several; without it: the bare model",
        json_schema_extra={"metavar": "[TASK=]FILE"},
    )
    format: Literal["raw", "prefix"] = Field(
        "raw",
        description="raw: a context is read as lm-eval's hf model does; prefix: as the source of the prefix's text "
        "format, and its continuation as the target",
    )
    apply_chat_template: bool = Field(False, description="write contexts as conversations, by the chat template")
    system_instruction: str = Field("", description="a system message, or a text before each context")
    num_fewshot: int | None = Field(
        None, ge=0, description="solved examples before each question (default: the task's)"
    )
    limit: int = Field(0, ge=0, description="only the first N documents of each task; 0: all")
    batch_size: int = Field(16, ge=1, description="requests that are computed together")
    include_path: str | None = Field(
        None, description="tasks of your own: YAML files", json_schema_extra={"metavar": "FOLDER"}
    )
    output: str | None = Field(
        None,
        description="write lm-eval's files there; a stopped evaluation goes on",
        json_schema_extra={"metavar": "FOLDER"},
    )
    log_samples: bool = Field(False, description="with --output: also write every document with its answers")
    seed: int = Field(1234, ge=0, description="of the solved examples, and of sampling")
    confirm_run_unsafe_code: bool = Field(False, description="allow tasks that run the code that the model writes")
    as_json: bool = json_option("the results")

    @field_validator("tasks")
    @classmethod
    def _check_tasks(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        if not names:
            raise ValueError("names no task")
        return names

    def conflicts(self) -> Iterator[tuple[tuple[str, ...], str]]:
        """Options that do not go together."""
        yield from super().conflicts()
        if self.format == "prefix" and not self.prefix:
            yield ("format", "prefix"), "--format prefix needs --prefix FILE, whose text format it is"
        if self.format == "prefix" and self.apply_chat_template:
            yield (
                ("format", "apply_chat_template"),
                "--format prefix cannot go with --apply-chat-template: both write text around a context; choose one",
            )
        if self.log_samples and not self.output:
            yield ("log_samples", "output"), "--log-samples needs --output FOLDER, where the samples go"


@command
def lm_eval(options: LmEvalOptions) -> int:
    """Measure a backbone with prefixes on the tasks of lm-eval, EleutherAI's evaluation harness.

    Without a prefix the figures are those of lm-eval's own `hf` model. Data that a task names on the Hugging Face hub
    is downloaded.

    For example:
        prefixtune lm-eval --prefix runs/mine --tasks hellaswag,arc_easy --limit 200
        prefixtune lm-eval --tasks lambada_openai --backbone smollm2-135m --output results
        prefixtune lm-eval --prefix arc_easy=runs/arc --prefix piqa=runs/piqa --tasks arc_easy,piqa
        prefixtune lm-eval --prefix runs/mine --tasks my_task --include-path tasks --format prefix --json
    """
    console = Console(quiet=options.quiet)
    files = split_by_task(options.prefix)
    found: list[Any] = []
    # Everything that can be wrong is reported before the model loads.
    check_all([lambda: found.append(_find_tasks(options)), *_checks(options, list(files.values()))])
    manager, names = found[0]
    console.info(f"loading {', '.join(names[:8])}{' ...' if len(names) > 8 else ''} ...")
    tasks = _load_tasks(options, manager, names, [task for task in files if task])
    backbone, prefixes = load_with_prefixes(console, options, list(files.values()), _check_prefixes)
    results = _evaluate(console, options, tasks, backbone, dict(zip(files, prefixes, strict=True)))
    if options.output:
        console.info(f"lm-eval's files: {options.output}")
    if options.as_json:
        print_json(results)
    else:
        _show(console, results, options)
    return 0


def split_by_task(texts: Sequence[str]) -> dict[str, str]:
    """Task -> file of the texts of --prefix; the file for all tasks has the name "".

    >>> split_by_task(["runs/mine", "piqa=runs/piqa"])
    {'': 'runs/mine', 'piqa': 'runs/piqa'}

    Raises:
        ConfigError: A task has two, or a name is empty.
    """
    files: dict[str, str] = {}
    for text in texts:
        task, equals, file = text.partition("=")
        if not equals or os.path.lexists(text):
            task, file = "", text
        if not file or (equals and not task and file != text):
            raise ConfigError(f"--prefix is {text!r}, but FILE or TASK=FILE is needed.", hint="name a prefix's file.")
        if task in files:
            whom = f"the task {task!r}" if task else "all tasks"
            raise ConfigError(
                f"--prefix names two for {whom}: {files[task]!r} and {file!r}.",
                hint="write TASK=FILE for a task's own, or A+B to join two.",
            )
        files[task] = file
    return files


def _checks(options: LmEvalOptions, files: Sequence[str]) -> list[Any]:
    from functools import partial

    from prefixtune.utils.files import check_writable

    writable = [partial(check_writable, Path(options.output) / "results.json")] if options.output else []
    return [*(partial(read_prefix, file) for file in files), *writable]


def _find_tasks(options: LmEvalOptions) -> tuple[Any, list[str]]:
    with needs_extra("lm-eval", "`prefixtune lm-eval`"):
        import lm_eval  # noqa: F401 - named first, of all that the extra brings

        from prefixtune.interop.lm_eval.tasks import find_tasks
    return find_tasks(options.tasks, options.include_path)


def _load_tasks(options: LmEvalOptions, manager: Any, names: Sequence[str], with_prefix: Sequence[str]) -> LoadedTasks:
    from prefixtune.interop.lm_eval.tasks import check_tasks, load_tasks, prefixes_by_task

    tasks = load_tasks(manager, names)
    prefixes_by_task(tasks, dict.fromkeys(with_prefix))
    check_tasks(tasks, unsafe_code=options.confirm_run_unsafe_code)
    return tasks


def _check_prefixes(prefixes: Sequence[Prefix]) -> None:
    from prefixtune.interop.lm_eval.loading import check_writes

    for prefix in prefixes:
        check_writes(prefix)


def _evaluate(
    console: Console, options: LmEvalOptions, tasks: LoadedTasks, backbone: Any, prefixes: dict[str, Prefix]
) -> dict[str, Any]:
    from prefixtune.interop.lm_eval.model import PrefixLM
    from prefixtune.interop.lm_eval.responses import RESPONSES_FILE
    from prefixtune.interop.lm_eval.run import evaluate_tasks
    from prefixtune.interop.lm_eval.tasks import prefixes_by_task

    for_all = prefixes.pop("", None)
    model = PrefixLM(
        backbone,
        for_all,
        task_prefixes=prefixes_by_task(tasks, prefixes),
        prompt_format=options.format,
        batch_size=options.batch_size,
        allow_other_backbone=options.allow_other_backbone,
        responses=Path(options.output) / RESPONSES_FILE if options.output else None,
        console=console,
    )
    if options.apply_chat_template and not model.chat_template(True):
        raise ConfigError(f"{backbone.name!r} has no chat template.", hint="leave --apply-chat-template out.")
    return evaluate_tasks(
        model,
        tasks,
        names={"model": _model_name(backbone.name, options.prefix), "prefix": ",".join(options.prefix)},
        output=Path(options.output) if options.output else None,
        log_samples=options.log_samples,
        limit=options.limit or None,
        num_fewshot=options.num_fewshot,
        apply_chat_template=options.apply_chat_template,
        system_instruction=options.system_instruction or None,
        confirm_run_unsafe_code=options.confirm_run_unsafe_code,
        torch_random_seed=options.seed,
        fewshot_random_seed=options.seed,
    )


def _model_name(backbone: str, prefixes: Sequence[str]) -> str:
    """What lm-eval's folder is called: the backbone and the prefixes, without their folders."""
    names = [Path(text.removeprefix("hub:")) for text in prefixes]
    stems = [name.parent.name if name.name == "prefix.safetensors" else name.stem for name in names]
    return "+".join([Path(backbone).name, *stems])


def _show(console: Console, results: Mapping[str, Any], options: LmEvalOptions) -> None:
    """Print the figures as a table."""
    from prefixtune.interop.lm_eval.run import result_rows

    rows = [
        [row.task, row.filter, row.shots, row.metric, row.value, None if row.stderr is None else f"± {row.stderr:.4f}"]
        for row in result_rows(results)
    ]
    of = ", ".join(options.prefix) or "the bare model"
    limit = f", the first {options.limit:,} documents of each task" if options.limit else ""
    console.table(f"{of}{limit}", ["task", "filter", "shots", "metric", "value", "stderr"], rows, result=True)
