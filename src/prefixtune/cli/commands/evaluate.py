"""`prefixtune evaluate`: decode for every example of a file, and score the outputs."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefixtune.cli.common import (
    AddCommand,
    add_decoding_arguments,
    find_artifact,
    generate_config,
    load_artifact,
    print_json,
)
from prefixtune.errors import ConfigError, PrefixError, did_you_mean
from prefixtune.training.config import TrainConfig
from prefixtune.utils.console import Console

if TYPE_CHECKING:
    from prefixtune.data import Example, Task
    from prefixtune.evaluation.records import Evaluation

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What `prefixtune evaluate` takes, besides how to decode."""
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--prefix",
        metavar="FILE",
        help="the prefix: a file, the folder of its run, or hub:OWNER/NAME; without it and --run: the bare model",
    )
    # `run` is what the command line calls.
    what.add_argument("--run", dest="run_folder", metavar="FOLDER", help="a run of `prefixtune train`, with any method")
    parser.add_argument("--task", help="default: the prefix's or the run's task")
    parser.add_argument("--data", required=True, metavar="PATH", help="examples with references: a file, or a folder")
    parser.add_argument("--split", metavar="{train,dev,test}", help="which part of a folder")
    parser.add_argument("--source", help="records: column or template (default: as in training)")
    parser.add_argument("--target", help="records: column or template (default: as in training)")
    parser.add_argument("--limit", type=int, default=0, metavar="N", help="only the first N examples")
    parser.add_argument(
        "--shots", type=int, default=0, metavar="N", help="show N solved examples of --train before each"
    )
    parser.add_argument("--train", metavar="PATH", help="where the examples of --shots come from")
    parser.add_argument(
        "--instruction",
        metavar="TEXT",
        default="",
        help="ask the bare model in words, in its chat template where it has one",
    )
    parser.add_argument("--metrics", metavar="NAMES", help="such as bleu,nist,meteor (default: the task's)")
    parser.add_argument("--intervals", action="store_true", help="also give 95 %% bootstrap intervals")
    parser.add_argument(
        "--output", metavar="FOLDER", help="write scores, outputs and settings there; a stopped evaluation goes on"
    )
    parser.add_argument("--outputs", metavar="FILE", help="also write the outputs, one a line")
    parser.add_argument("--json", action="store_true", help="print the scores as JSON on stdout")
    parser.add_argument("--quiet", action="store_true", help="no progress, only results and errors")


def run(options: argparse.Namespace) -> int:
    """`prefixtune evaluate`."""
    for name in ("limit", "shots"):
        if getattr(options, name) < 0:
            raise ConfigError(
                f"--{name} is {getattr(options, name)}, but must be 0 or above.", hint="leave it out for none."
            )
    if options.shots and (not options.train or options.prefix or options.run_folder):
        raise ConfigError(
            f"--shots {options.shots} shows the bare model examples of --train FILE.",
            hint="give --train, without --prefix and --run.",
        )
    if options.instruction and (options.prefix or options.run_folder):
        raise ConfigError(
            "--instruction is for the bare model; a prefix needs none.", hint="leave out --prefix and --run."
        )
    from prefixtune.data import TASKS, read_task
    from prefixtune.data.encoding import default_format
    from prefixtune.evaluation.decode import DECODED_FILE
    from prefixtune.evaluation.evaluate import check_examples, check_kind, evaluate
    from prefixtune.evaluation.prompting import few_shot_format, instruction_format
    from prefixtune.evaluation.records import summarize, write_evaluation
    from prefixtune.prefix.text_format import read_text_format
    from prefixtune.utils.files import write_text
    from prefixtune.utils.writable import check_writable

    console = Console(quiet=options.quiet or options.json)
    # All that can be wrong is reported before the model loads.
    file, weights, header = find_artifact(options, options.prefix)
    task = options.task or header.get("task") or "records"
    source, target = options.source, options.target
    trained = read_text_format(header)
    if trained is not None and task in TASKS and TASKS[task].takes_columns and not _is_conll(options.data):
        # References are made as the training made its targets.
        source, target = source or trained.source or None, target or trained.target_template or None
    examples = read_task(task, options.data, source=source, target=target, split=options.split)
    examples = examples[: options.limit or None]
    chosen = TASKS[task]
    metrics: Sequence[str] = chosen.metrics
    if options.metrics is not None:
        metrics = _asked_for(options.metrics, chosen)
    check_examples(examples)
    check_kind(chosen.kind, labelled=weights is None and bool(header.get("labels")), intervals=options.intervals)
    config = generate_config(options, [], task)
    folder = Path(options.output) if options.output else None
    written = [Path(options.outputs)] if options.outputs else []
    for path in [*written, *([folder / DECODED_FILE] if folder else [])]:
        check_writable(path)
    shown = _shots(options, task, source, target)
    overlap = _overlap(console, examples, options.train if shown else weights or file, shown)
    backbone, prefix, form = load_artifact(console, options, file, weights)
    if options.instruction:
        form = instruction_format(backbone, options.instruction, shown)
    elif shown:
        form = few_shot_format(form or default_format(backbone), shown, backbone.separator, backbone.end)
    with console.progress("generating", len(examples)) as bar:
        outcome = evaluate(
            backbone,
            examples,
            prefix,
            text_format=form,
            config=config,
            kind=chosen.kind,
            protocol=chosen.protocol,
            metrics=metrics,
            intervals=options.intervals,
            resume_file=None if folder is None else folder / DECODED_FILE,
            on_batch=bar.update,
            on_cut=lambda cut: console.info(f"{len(cut)} of {len(examples)} sources were truncated to fit"),
        )
    facts = {
        "title": _title(options, task),
        "task": task,
        "data": Path(options.data).name,
        "split": options.split,
        "method": "few-shot" if options.shots else header.get("method", "prefix") if header else "zero-shot",
        "backbone": backbone.name,
        "prefix": options.prefix,
        "settings": {
            "decoding": dataclasses.asdict(config),
            "text_format": None if form is None else form.to_dict(),
            "shots": options.shots,
            "limit": options.limit,
            "dtype": str(backbone.dtype).removeprefix("torch."),
            "protocol": chosen.protocol,
        },
        **overlap,
    }
    if folder is not None:
        write_evaluation(folder, outcome, examples, facts, protocol=chosen.protocol)
        console.info(f"scores, outputs and settings: {folder}")
    if options.json:
        asked = {"num_examples": len(examples), "task": task, "prefix": options.prefix, "run": options.run_folder}
        print_json({**summarize(outcome), **asked, **overlap})
    else:
        _show(console, outcome, len(examples), options.data)
    if options.outputs:
        write_text(Path(options.outputs), "".join(line.replace("\n", " ") + "\n" for line in outcome.outputs))
    return 0


def _asked_for(names: str, task: Task) -> list[str]:
    """The metrics that were named, all of which can be computed here."""
    from prefixtune.evaluation.metrics import METRICS, Unavailable, measure

    metrics = [name.strip() for name in names.split(",") if name.strip()]
    if task.kind != "generation":
        if metrics != [*task.metrics]:
            raise ConfigError(
                f"--metrics is for texts, but the task {task.name!r} is {task.kind}.",
                hint=f"leave it out for {', '.join(task.metrics)}.",
            )
        return metrics
    unknown = next((name for name in metrics if name not in METRICS), None if metrics else names)
    if unknown is not None:
        raise ConfigError(f"there is no metric {unknown!r}.", hint=did_you_mean(unknown, METRICS))
    try:
        # What is missing shows on any text.
        measure(["a word"], [["a word"]], protocol=task.protocol, metrics=metrics)
    except Unavailable as error:
        raise ConfigError(f"{error.reason}.", hint=f"{error.remedy}, or leave the metric out.") from error
    return metrics


def _shots(options: argparse.Namespace, task: str, source: str | None, target: str | None) -> list[Example]:
    """The solved examples that the bare model is shown."""
    from prefixtune.data import read_task

    if not options.shots:
        return []
    read = read_task(task, options.train, source=source, target=target, split="train")
    shown = [example for example in read if example.targets][: options.shots]
    if len(shown) < options.shots:
        raise ConfigError(
            f"--shots is {options.shots}, but {options.train!r} has {len(shown)} examples with a target.",
            hint="show fewer.",
        )
    return shown


def _overlap(
    console: Console, examples: Sequence[Example], origin: str | Path | None, shown: Sequence[Example]
) -> dict[str, Any]:
    """How many of the examples stand in what the model was trained on or shown, where that is known; with a warning."""
    from prefixtune.evaluation.overlap import find_overlap, training_examples
    from prefixtune.training.folder import CONFIG_FILE

    if origin is None:
        return {}
    training: Sequence[Example] | None = shown
    name = str(origin)
    if not shown:
        path = Path(origin).parent / CONFIG_FILE
        if not path.is_file():
            return {}
        try:
            config = TrainConfig.from_toml(path)
            name, training = config.train or config.task, training_examples(config)
        except PrefixError as error:
            console.info(f"not compared with the training set: {error.message}")
            return {}
    if training is None:
        return {}
    found = find_overlap(examples, training, name)
    if found.count:
        console.warn(f"{found}.")
    return {"overlap": found.to_dict()}


def _title(options: argparse.Namespace, task: str) -> str:
    of = options.run_folder or options.prefix or options.backbone or "the bare model"
    return f"{of} on {task}{f' ({options.split})' if options.split else ''}"


def _show(console: Console, outcome: Evaluation, count: int, data: str) -> None:
    rows = []
    for name, score in outcome.scores.items():
        between = "" if score.interval is None else f" [{score.interval[0]:.4g}, {score.interval[1]:.4g}]"
        rows.append([name, f"{score.score:.{2 if abs(score.score) >= 10 else 4}f}{between}", score.implementation])
    console.table(f"{count} examples of {data}", ["metric", "score", "implementation"], rows, result=True)
    for grouping, groups in outcome.groups.items():
        lines = [
            [group, str(found.num_examples), *(f"{score.score:.2f}" for score in found.scores.values())]
            for group, found in groups.items()
        ]
        names = list(next(iter(groups.values())).scores)
        console.table(f"by {grouping}", ["", "examples", *names], lines, result=True)
    for name, reason in outcome.left_out.items():
        console.info(f"{name} was left out: {reason}")


def _is_conll(path: str) -> bool:
    """Whether a file has no columns by name."""
    return path.removesuffix(".gz").endswith((".conll", ".bio", ".txt"))


def register(command: AddCommand) -> None:
    """Add the command and its options to the command line."""
    parser = command(
        "evaluate",
        run,
        "decode for every example of a file and score the outputs",
        """

examples:
  prefixtune evaluate --prefix runs/e2e/prefix.safetensors --task e2e --data testset_w_refs.csv
  prefixtune evaluate --run runs/full --data webnlg/ --split test --output runs/full/test --intervals
  prefixtune evaluate --task e2e --data e2e/ --split test --shots 3 --train e2e/""",
    )
    add_arguments(parser)
    add_decoding_arguments(parser)
