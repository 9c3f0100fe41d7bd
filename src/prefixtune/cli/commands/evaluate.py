"""`prefixtune evaluate`: decode for every example of a file, and score the outputs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from prefixtune.cli.common import PathText, check_metrics, print_json, show_scores
from prefixtune.cli.decoding import DecodingOptions, generate_config, note_unused
from prefixtune.cli.loading import Artifact, columns_as_trained, find_artifact, load_artifact, split_joined
from prefixtune.cli.options import OutputOptions, command, form_option, json_option
from prefixtune.errors import ConfigError, PrefixError
from prefixtune.training.config import FormName, TrainConfig
from prefixtune.utils.config import CommaList
from prefixtune.utils.console import Console

if TYPE_CHECKING:
    from prefixtune.data import Example, Task
    from prefixtune.data.labels import Labels
    from prefixtune.evaluation.records import Evaluation
    from prefixtune.inference.config import GenerateConfig

__all__ = ["evaluate"]


class EvaluateOptions(DecodingOptions, OutputOptions):
    """The options of `prefixtune evaluate`."""

    prefix: PathText | None = Field(
        None,
        description="a file, the folder of its run, or hub:OWNER/NAME; A+B joins several; without it and --run: the "
        "bare model",
        json_schema_extra={"metavar": "FILE"},
    )
    run_folder: PathText | None = Field(
        None,
        description="a run of `prefixtune train`, with any method",
        json_schema_extra={"flag": "run", "metavar": "FOLDER"},
    )
    task: str | None = Field(None, description="default: the prefix's or the run's task")
    data: str = Field(
        description="examples with references: a file, a folder, hub:NAME, or - (stdin)",
        json_schema_extra={"metavar": "PATH"},
    )
    split: Literal["", "train", "dev", "test"] = Field("", description="which part of a folder")
    source: str | None = Field(None, description="records: column or template (default: as in training)")
    target: str | None = Field(None, description="records: column or template (default: as in training)")
    form: Literal["", FormName] = form_option()
    limit: int = Field(0, ge=0, description="only the first N examples; 0: all")
    shots: int = Field(0, ge=0, description="show N solved examples of --train before each")
    train: str | None = Field(
        None, description="where the examples of --shots come from", json_schema_extra={"metavar": "PATH"}
    )
    instruction: str = Field("", description="ask the bare model in words, in its chat template where it has one")
    metrics: CommaList[str] = Field(
        (), description="such as bleu,nist,meteor (default: the task's)", json_schema_extra={"metavar": "NAMES"}
    )
    intervals: bool = Field(False, description="also give 95 % bootstrap intervals")
    output: str | None = Field(
        None,
        description="write scores, outputs and settings there; a stopped evaluation goes on",
        json_schema_extra={"metavar": "FOLDER"},
    )
    outputs: str | None = Field(
        None, description="also write the outputs, one a line", json_schema_extra={"metavar": "FILE"}
    )
    as_json: bool = json_option("the scores")

    def conflicts(self) -> Iterator[tuple[tuple[str, ...], str]]:
        """Options that do not go together."""
        yield from super().conflicts()
        if self.prefix and self.run_folder:
            yield ("prefix", "run_folder"), "--prefix cannot go with --run, whose prefix is used; give one of the two"
        trained = self.prefix or self.run_folder
        if self.shots and (not self.train or trained):
            yield (
                ("shots", "train"),
                f"--shots {self.shots} shows the bare model examples of --train FILE: give --train, without --prefix "
                "and --run",
            )
        if self.train and not self.shots:
            yield ("train", "shots"), "--train is for --shots N: give both, or leave it out"
        if self.instruction and trained:
            yield (
                ("instruction",),
                "--instruction is for the bare model, a prefix needs none: leave out --prefix and --run",
            )


@command
def evaluate(options: EvaluateOptions) -> int:
    """Decode for every example of a file, and score the outputs.

    The defaults of decoding are those of the task.

    For example:
        prefixtune evaluate --prefix runs/e2e/prefix.safetensors --task e2e --data testset_w_refs.csv
        prefixtune evaluate --run runs/full --data webnlg/ --split test --output runs/full/test --intervals
        prefixtune evaluate --task e2e --data e2e/ --split test --shots 3 --train e2e/
    """
    from prefixtune.data import TASKS
    from prefixtune.data.labels import check_known, labels_in
    from prefixtune.evaluation.evaluate import check_kind
    from prefixtune.evaluation.metrics import METRICS, Unavailable, measure
    from prefixtune.evaluation.records import summarize, write_evaluation
    from prefixtune.utils.files import check_writable, write_text

    console = Console(quiet=options.quiet)
    # Everything that can be wrong is reported before the model loads.
    artifact = find_artifact(options, options.prefix)
    name, columns, examples = _read_examples(console, options, artifact)
    task = TASKS[name]
    metrics, labels = options.metrics or task.metrics, labels_in(artifact.header)
    check_kind(
        task.kind, labelled=labels is not None, intervals=options.intervals, has_prefix=artifact.prefix is not None
    )
    if labels is not None:
        check_known(examples, labels)
    check_metrics(metrics, METRICS if task.kind == "generation" else task.metrics)
    if options.metrics and task.kind == "generation":
        # Any text shows whether a library is missing.
        try:
            measure(["a word"], [["a word"]], protocol=task.protocol, metrics=metrics)
        except Unavailable as error:
            raise ConfigError(f"{error.reason}.", hint=f"{error.remedy}, or leave the metric out.") from error
    config = generate_config(options, [artifact.header], name)
    if options.print_config:
        print(config.to_toml().rstrip())
        return 0
    note_unused(console, options, config)
    for path in filter(None, (options.outputs, options.output and f"{options.output}/any")):
        check_writable(Path(path))
    shots = _read_shots(options, name, columns)
    overlap = _overlap(console, options, artifact, examples, shots)
    outcome, settings = _evaluate(console, options, artifact, examples, task, metrics, config, shots, labels)
    if outcome.num_unended:
        console.warn(
            f"{outcome.num_unended} of {len(examples)} outputs did not end within {config.max_new_tokens} tokens, and "
            "are scored as they are (--max-new-tokens)."
        )
    if options.output:
        method = artifact.header.get("method", "prefix") if artifact.header else "zero-shot"
        of = options.run_folder or options.prefix or options.backbone or "the bare model"
        facts = {
            "title": f"{of} on {name}{f' ({options.split})' if options.split else ''}",
            "task": name,
            "data": Path(options.data).name,
            "split": options.split or None,
            "method": "few-shot" if shots else method,
            **settings,
            **overlap,
        }
        write_evaluation(Path(options.output), outcome, examples, facts, protocol=task.protocol)
        console.info(f"scores, outputs and settings: {options.output}")
    summary = summarize(outcome)
    if options.as_json:
        facts = {"num_examples": len(examples), "task": name, "prefix": options.prefix, "run": options.run_folder}
        print_json({**summary, **facts, **overlap})
    else:
        show_scores(console, f"{len(examples)} examples of {options.data}", summary, "examples")
        for left_out, reason in outcome.left_out.items():
            console.info(f"{left_out} was left out: {reason}")
    if options.outputs:
        write_text(Path(options.outputs), "".join(line.replace("\n", " ") + "\n" for line in outcome.outputs))
    return 0


def _read_examples(
    console: Console, options: EvaluateOptions, artifact: Artifact
) -> tuple[str, dict[str, Any], list[Example]]:
    """The task's name, what its files are read with, and the examples; a line says how data of one's own is read.

    Raises:
        ConfigError: An option is for texts that are generated, but the data is texts alone.
    """
    from prefixtune.data import TASKS, form_that_fits, read_task, resolve_task
    from prefixtune.data.forms import describe_data
    from prefixtune.evaluation.evaluate import check_examples

    name = options.task or artifact.header.get("task") or "records"
    columns = columns_as_trained(options, name, artifact.header)
    if _is_conll(options.data):
        columns |= {"source": options.source, "target": options.target}
    if name == "records" and not any(columns.values()):
        trained = str(artifact.header.get("form") or "")
        columns["form"] = form_that_fits(name, options.data, trained, split=options.split or None)
    name, form, first_row = resolve_task(name, options.data, split=options.split or None, **columns)
    examples = read_task(name, options.data, split=options.split or None, needs_targets=True, **columns)
    examples = examples[: options.limit or None]
    if form is not None:
        console.info(describe_data(form, examples, options.data, first_row))
        given = [options.flag(name) for name in ("metrics", "shots", "instruction") if getattr(options, name)]
        if form.name == "text" and given:
            raise ConfigError(
                f"{', '.join(given)}: not for texts alone, whose perplexity is measured.",
                hint="leave it out, or name a source and a target (--source, --target).",
            )
    check_examples(examples, TASKS[name].protocol)
    return name, columns, examples


def _evaluate(
    console: Console,
    options: EvaluateOptions,
    artifact: Artifact,
    examples: Sequence[Example],
    task: Task,
    metrics: Sequence[str],
    config: GenerateConfig,
    shots: Sequence[Example],
    labels: Labels | None,
) -> tuple[Evaluation, dict[str, Any]]:
    """Load the model, decode and score; returns the evaluation, and the backbone and settings for its files."""
    from prefixtune.data.encoding import default_format
    from prefixtune.evaluation.decode import DECODED_FILE
    from prefixtune.evaluation.evaluate import evaluate as evaluate_prefix
    from prefixtune.evaluation.prompting import few_shot_format, instruction_format
    from prefixtune.prefix.prefix import content_hash

    backbone, prefix, text_format = load_artifact(console, options, artifact)
    if options.instruction:
        text_format = instruction_format(backbone, options.instruction, shots)
    elif shots:
        text_format = few_shot_format(text_format or default_format(backbone), shots, backbone.separator, backbone.end)
    with console.progress("generating", len(examples)) as bar:
        outcome = evaluate_prefix(
            backbone,
            examples,
            prefix,
            text_format=text_format,
            config=config,
            kind=task.kind,
            labels=None if artifact.weights is None else labels,
            protocol=task.protocol,
            metrics=metrics if task.kind == "generation" else None,
            intervals=options.intervals,
            resume_file=Path(options.output) / DECODED_FILE if options.output else None,
            on_batch=bar.update,
            on_cut=lambda cut: console.info(f"{len(cut)} of {len(examples)} sources were truncated to fit"),
        )
    settings = {
        "decoding": config.to_dict(),
        "text_format": None if text_format is None else text_format.to_dict(),
        "shots": options.shots,
        "limit": options.limit,
        "dtype": backbone.dtype_name,
        "protocol": task.protocol,
    }
    facts: dict[str, Any] = {"backbone": backbone.name, "prefix": options.prefix, "settings": settings}
    if prefix is not None:
        # Model cards take the scores of this very prefix alone.
        facts["prefix_hash"] = content_hash(prefix)
    return outcome, facts


def _read_shots(options: EvaluateOptions, task: str, columns: dict[str, Any]) -> list[Example]:
    """The solved examples of --shots.

    Raises:
        ConfigError: There are too few.
    """
    from prefixtune.data import read_task

    if not options.shots or options.train is None:
        return []
    examples = read_task(task, options.train, split="train", **columns)
    shots = [example for example in examples if example.targets][: options.shots]
    if len(shots) < options.shots:
        raise ConfigError(
            f"--shots is {options.shots}, but {options.train!r} has {len(shots)} examples with a target.",
            hint="show fewer.",
        )
    return shots


def _overlap(
    console: Console, options: EvaluateOptions, artifact: Artifact, examples: list[Example], shots: list[Example]
) -> dict[str, Any]:
    """How many examples are also among the shots, or in the training sets of the prefix or the weights; warns of them.

    Empty: these are unknown.
    """
    from prefixtune.evaluation.overlap import find_overlap, training_examples
    from prefixtune.training.folder import CONFIG_FILE

    known, name = shots, str(options.train)
    files = [artifact.weights] if artifact.weights else split_joined(artifact.prefix) if artifact.prefix else []
    for file in [] if shots else files:
        path = Path(file).parent / CONFIG_FILE
        if path.is_file():
            try:
                config = TrainConfig.from_file(path)
                known, name = [*known, *(training_examples(config) or ())], config.train or config.task
            except PrefixError as error:
                console.info(f"not compared with the training set: {error.message}")
    if not known:
        return {}
    overlap = find_overlap(examples, known, name)
    if overlap.count:
        console.warn(f"{overlap}.")
    return {"overlap": overlap.to_dict()}


def _is_conll(path: str) -> bool:
    """Whether a file has no named columns."""
    return path.removesuffix(".gz").endswith((".conll", ".bio", ".txt"))
