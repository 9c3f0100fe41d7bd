"""`prefixtune lm-eval`: measure a backbone with a prefix on lm-eval's tasks."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from pydantic import Field

from prefixtune.cli.decoding import BackboneOptions
from prefixtune.cli.loading import load_with_prefixes
from prefixtune.cli.options import OutputOptions, command, json_option
from prefixtune.cli.show import show
from prefixtune.errors import ConfigError, PrefixError
from prefixtune.utils.config import CommaList
from prefixtune.utils.console import Console
from prefixtune.utils.extras import needs_extra
from prefixtune.utils.files import check_writable

__all__ = ["lm_eval"]


class LmEvalOptions(BackboneOptions, OutputOptions):
    """The options of `prefixtune lm-eval`."""

    tasks: CommaList[str] = Field(
        min_length=1,
        description="lm-eval's tasks, groups or tags, with * and ? as wildcards, or a task's YAML file",
        json_schema_extra={"metavar": "NAMES"},
    )
    prefix: str = Field(
        "",
        description="a file, the folder of its run, or hub:OWNER/NAME; A+B joins several; without it: the bare model",
        json_schema_extra={"metavar": "FILE"},
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
        description="write lm-eval's files there",
        json_schema_extra={"metavar": "FOLDER"},
    )
    log_samples: bool = Field(False, description="with --output: also write every document with its answers")
    seed: int = Field(1234, ge=0, description="of the solved examples, and of sampling")
    confirm_run_unsafe_code: bool = Field(False, description="allow tasks that run the code that the model writes")
    as_json: bool = json_option("the results")

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
    """Measure a backbone with a prefix on the tasks of lm-eval, EleutherAI's evaluation harness.

    Without a prefix the figures are those of lm-eval's own `hf` model. Data that a task names on the Hugging Face hub
    is downloaded.

    For example:
        prefixtune lm-eval --prefix runs/mine --tasks hellaswag,arc_easy --limit 200
        prefixtune lm-eval --tasks lambada_openai --backbone smollm2-135m --output results
        prefixtune lm-eval --prefix runs/mine --tasks my_task --include-path tasks --format prefix --json
    """
    with needs_extra("lm-eval", "`prefixtune lm-eval`"):
        from lm_eval import simple_evaluate
        from lm_eval.loggers import EvaluationTracker
        from lm_eval.tasks import TaskManager
        from lm_eval.utils import handle_non_serializable, make_table

        from prefixtune.interop.lm_eval.model import PrefixLM, check_writes
    if options.output:
        check_writable(Path(options.output) / "any")
    manager = TaskManager(include_path=options.include_path)
    matched = {name: [name] if Path(name).is_file() else manager.match_tasks([name]) for name in options.tasks}
    if unknown := [name for name, found in matched.items() if not found]:
        raise ConfigError(
            f"lm-eval has no task {', '.join(map(repr, unknown))}.",
            hint="`lm-eval ls tasks` lists them; --include-path FOLDER adds own ones.",
        )
    console = Console(quiet=options.quiet)
    files = [options.prefix] if options.prefix else []
    backbone, prefixes = load_with_prefixes(console, options, files, lambda read: list(map(check_writes, read)))
    model = PrefixLM(
        backbone,
        next(iter(prefixes), None),
        prompt_format=options.format,
        batch_size=options.batch_size,
        allow_other_backbone=options.allow_other_backbone,
    )
    if options.apply_chat_template and not model.chat_template(True):
        raise ConfigError(f"{backbone.name!r} has no chat template.", hint="leave --apply-chat-template out.")
    # Its files are in a folder of this name.
    name = "+".join(filter(None, (Path(backbone.name).name, options.prefix.strip("/").replace("/", "__"))))
    tracker = EvaluationTracker(output_path=options.output)
    results = simple_evaluate(
        model=model,
        model_args={"model": name, "prefix": options.prefix},
        tasks=list(dict.fromkeys(task for found in matched.values() for task in found)),
        task_manager=manager,
        batch_size=model.batch_size,
        device=str(model.device),
        log_samples=options.log_samples,
        evaluation_tracker=tracker,
        limit=options.limit or None,
        num_fewshot=options.num_fewshot,
        apply_chat_template=options.apply_chat_template,
        system_instruction=options.system_instruction or None,
        confirm_run_unsafe_code=options.confirm_run_unsafe_code,
        torch_random_seed=options.seed,
        fewshot_random_seed=options.seed,
    )
    samples = results.pop("samples", None) or {}
    if options.output:
        tracker.save_results_aggregated(results=results, samples=samples or None)
        for task, rows in samples.items():
            tracker.save_results_samples(task_name=task, samples=rows)
    show(
        json.loads(json.dumps(results, default=handle_non_serializable)),
        make_table(results),
        *([make_table(results, "groups")] if results.get("groups") else []),
        as_json=options.as_json,
    )
    if options.output:
        # lm-eval itself goes on without files that it cannot write.
        if not any(Path(options.output).rglob(f"results_{tracker.date_id}.json")):
            raise PrefixError(f"lm-eval could not write into {options.output!r}.", hint="choose another folder.")
        console.info(f"lm-eval's files: {options.output}")
    return 0
