"""`prefixtune lm-eval`: measure a backbone with a prefix on lm-eval's tasks."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Literal

from prefixtune.cli.decoding import BackboneOptions
from prefixtune.cli.loading import load_trained, read_trained
from prefixtune.cli.options import PREFIX, Conflicts, PathText, command, option
from prefixtune.errors import ConfigError, first_line
from prefixtune.utils.config import CommaList
from prefixtune.utils.extras import needs_extra


class LmEvalOptions(BackboneOptions):
    """The options of `prefixtune lm-eval`."""

    tasks: CommaList[str] = option(
        description="lm-eval's tasks, groups or tags, with * and ? as wildcards, or a task's YAML file",
        min_length=1,
        metavar="NAMES",
    )
    prefix: PathText = option("", f"{PREFIX}; without it: the bare model", metavar="FILE")
    format: Literal["raw", "prefix"] = option(
        "raw", "how a context is read: raw: as by lm-eval's hf model; prefix: as a source, in the prefix's text format"
    )
    apply_chat_template: bool = option(False, "write contexts as conversations, by the chat template")
    num_fewshot: int | None = option(None, "solved examples before each question (default: the task's)", ge=0)
    limit: int = option(0, "only the first N documents of each task; 0: all", ge=0)
    batch_size: int = option(16, "requests that are computed together", ge=1)
    include_path: str | None = option(None, "tasks of your own: YAML files", metavar="FOLDER")

    def conflicts(self) -> Conflicts:
        """Options that do not go together."""
        yield from super().conflicts()
        yield from self.only_with("prefix", "format")
        yield from self.apart("format", "apply_chat_template")


@command
def lm_eval(options: LmEvalOptions) -> None:
    """Measure a backbone with a prefix on the tasks of lm-eval, EleutherAI's evaluation harness.

    Without a prefix the figures are those of lm-eval's own `hf` model. Data that a task names on the Hugging Face hub
    is downloaded. From Python the model takes all of lm-eval's options.

    For example:
        prefixtune lm-eval --prefix runs/mine --tasks hellaswag,arc_easy --limit 200
        prefixtune lm-eval --tasks lambada_openai --backbone smollm2-135m --json > results.json
        prefixtune lm-eval --prefix runs/mine --tasks my_task --include-path tasks --format prefix
    """
    if options.console.quiet:
        os.environ["TQDM_DISABLE"] = "1"
    with needs_extra("lm-eval", "`prefixtune lm-eval`"):
        import jinja2
        import yaml
        from lm_eval import simple_evaluate
        from lm_eval.tasks import TaskManager
        from lm_eval.utils import handle_non_serializable, make_table

        from prefixtune.interop.lm_eval.model import PrefixLM, check_writes
    if options.include_path and not Path(options.include_path).is_dir():
        raise ConfigError(
            f"--include-path {options.include_path!r} is no folder.", hint="name the folder of the tasks."
        )
    manager = TaskManager(include_path=options.include_path)
    matched = {name: [name] if Path(name).is_file() else manager.match_tasks([name]) for name in options.tasks}
    if unknown := [name for name, found in matched.items() if not found]:
        raise ConfigError(
            f"lm-eval has no task {', '.join(map(repr, unknown))}.",
            hint="`lm-eval ls tasks` lists them; --include-path FOLDER adds own ones.",
        )
    trained = read_trained(options, [options.prefix] if options.prefix else [])
    for prefix in trained.prefixes:
        check_writes(prefix)
    backbone, prefixes, _ = load_trained(options, trained)
    model = PrefixLM(
        backbone,
        next(iter(prefixes), None),
        prompt_format=options.format,
        batch_size=options.batch_size,
        allow_other_backbone=options.allow_other_backbone,
    )
    if options.apply_chat_template and not model.chat_template(True):
        raise ConfigError(f"{backbone.name!r} has no chat template.", hint="leave --apply-chat-template out.")
    try:
        results = simple_evaluate(
            model=model,
            model_args={"model": backbone.name, "prefix": options.prefix},
            tasks=list(dict.fromkeys(task for found in matched.values() for task in found)),
            task_manager=manager,
            batch_size=model.batch_size,
            device=str(model.device),
            log_samples=False,
            limit=options.limit or None,
            num_fewshot=options.num_fewshot,
            apply_chat_template=options.apply_chat_template,
        )
    except (OSError, ValueError, jinja2.TemplateError, yaml.YAMLError) as error:
        hint = "check the task's file and its data, --num-fewshot, and the connection."
        raise ConfigError(f"lm-eval cannot run these tasks: {first_line(error)}", hint=hint) from error
    groups = [make_table(results, "groups")] if results.get("groups") else []
    facts = json.loads(json.dumps(results, default=handle_non_serializable))
    options.show(facts, make_table(results), *groups)
