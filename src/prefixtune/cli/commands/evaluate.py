"""`prefixtune evaluate`: decode for every example of a file, or take outputs that exist, and score them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from prefixtune.cli.decoding import DecodingOptions, generate_config, note_unused
from prefixtune.cli.loading import (
    Artifact,
    columns_as_trained,
    find_artifact,
    load_artifact,
    split_joined,
    started_engine,
)
from prefixtune.cli.options import OutputOptions, PathText, command, form_option, json_option
from prefixtune.cli.show import Table, format_score, score_tables, show
from prefixtune.errors import ConfigError, PrefixError
from prefixtune.training.config import FormName, TrainConfig
from prefixtune.utils.config import CommaList
from prefixtune.utils.console import Console

if TYPE_CHECKING:
    from prefixtune.data import Example, Task
    from prefixtune.inference.config import GenerateConfig
    from prefixtune.results import Evaluation, Overlap

__all__ = ["evaluate"]

_FOR_MODELS = ("prefix", "run_folder", "shots", "instruction", "backbone")
_FOR_OUTPUTS = ("against", "protocol", "samples")


def _named(metavar: str, description: str, default: Any = None, **extra: str) -> Any:
    """A field whose value has this name in the help."""
    return Field(default, description=description, json_schema_extra={"metavar": metavar, **extra})


class EvaluateOptions(DecodingOptions, OutputOptions):
    """The options of `prefixtune evaluate`."""

    prefix: PathText | None = _named("FILE", "a file, a run's folder, hub:OWNER/NAME, or A+B; none: the bare model")
    run_folder: PathText | None = _named("FOLDER", "a run of `prefixtune train`, with any method", flag="run")
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
    train: str | None = _named("PATH", "where the examples of --shots come from")
    instruction: str = Field("", description="ask the bare model in words, in its chat template where it has one")
    metrics: CommaList[str] = _named("NAMES", "such as bleu,nist,meteor (default: the task's)", ())
    intervals: bool = Field(False, description="also give 95 % bootstrap intervals")
    output: str | None = _named("FOLDER", "write scores, outputs and settings there; a stopped evaluation goes on")
    outputs: str | None = _named("FILE", 'score these, and decode nothing: one a line, or .jsonl with the key "output"')
    against: str | None = _named("FILE", "outputs of a second system: test the difference from --outputs")
    protocol: Literal["", "e2e", "webnlg", "dart", "summarization", "plain"] = Field(
        "", description="of --outputs: by whose rules texts are scored (default: the task's)"
    )
    samples: int = Field(1000, ge=2, le=100_000, description="of --outputs: draws of intervals and of the test")
    as_json: bool = json_option("the scores")

    def conflicts(self) -> Iterator[tuple[tuple[str, ...], str]]:
        """Options that do not go together."""
        yield from super().conflicts()
        trained = self.prefix or self.run_folder
        if self.prefix and self.run_folder:
            yield ("prefix", "run_folder"), "--prefix cannot go with --run, whose prefix is used; give one of the two"
        if (self.shots or self.instruction) and trained:
            yield (
                ("shots", "instruction"),
                "--shots and --instruction are for the bare model, without --prefix and --run",
            )
        if bool(self.shots) != bool(self.train):
            yield ("shots", "train"), "--shots N shows examples of --train FILE: give both, or neither"
        given = [name for name in (_FOR_MODELS if self.outputs else _FOR_OUTPUTS) if name in self.model_fields_set]
        if given:
            listed = ", ".join(map(self.flag, given))
            yield tuple(given), f"{listed} {'cannot go with' if self.outputs else 'needs'} --outputs FILE"


@command
def evaluate(options: EvaluateOptions) -> int:
    """Decode for every example of a file, and score the outputs; or score outputs of any system (--outputs).

    The defaults of decoding, the metrics and the rules of scoring are those of the task.

    For example:
        prefixtune evaluate --prefix runs/e2e/prefix.safetensors --task e2e --data testset_w_refs.csv
        prefixtune evaluate --run runs/full --data webnlg/ --split test --output runs/full/test --intervals
        prefixtune evaluate --task e2e --data e2e/ --split test --shots 3 --train e2e/
        prefixtune evaluate --task e2e --data e2e/ --split test --outputs a.txt --against b.txt
    """
    from prefixtune.data import TASKS
    from prefixtune.evaluation.scores import check_examples, check_metrics, write_evaluation
    from prefixtune.utils.files import check_writable

    console = Console(quiet=options.quiet)
    # Everything that can be wrong is reported before the model loads.
    artifact = find_artifact(options, options.prefix)
    name, columns, examples = _read_examples(console, options, artifact)
    task, scored = TASKS[name], examples[: options.limit or None]
    protocol = options.protocol or task.protocol
    check_examples(scored, protocol)
    check_metrics(options.metrics or None, kind=task.kind, protocol=protocol)
    if options.output:
        check_writable(Path(options.output) / "any")
    if options.outputs:
        outcome = _score(options, name, task, examples)
    else:
        config = generate_config(options, [artifact.header], name)
        if options.print_config:
            print(config.to_toml().rstrip())
            return 0
        outcome = _decode(console, options, artifact, scored, task, config, _read_shots(options, name, columns))
    split = f" ({options.split})" if options.split else ""
    of = options.outputs or options.run_folder or options.prefix or options.backbone or "the bare model"
    outcome = outcome.with_facts(
        title=f"{of} on {name}{split}", task=name, data=Path(options.data).name, split=options.split or None
    )
    if options.output:
        write_evaluation(Path(options.output), outcome, scored, protocol=protocol)
        console.info(f"scores, outputs and settings: {options.output}")
    _show(console, options, outcome)
    return 0


def _read_examples(
    console: Console, options: EvaluateOptions, artifact: Artifact
) -> tuple[str, dict[str, Any], list[Example]]:
    """The task's name, what its files are read with, and the examples; a line says how data of one's own is read.

    Raises:
        ConfigError: An option is for texts that are generated, but the data is texts alone.
    """
    from prefixtune.data import read_task, resolve_task
    from prefixtune.data.forms import describe_data

    name, split = options.task or artifact.header.get("task") or "records", options.split or None
    columns = columns_as_trained(options, name, artifact.header)
    name, form, first_row = resolve_task(name, options.data, split=split, **columns)
    examples = read_task(name, options.data, split=split, needs_targets=True, **columns)
    if form is not None:
        console.info(describe_data(form, examples, options.data, first_row))
        given = [options.flag(name) for name in ("metrics", "shots", "instruction") if getattr(options, name)]
        if form.name == "text" and given:
            raise ConfigError(
                f"{', '.join(given)}: not for texts alone, whose perplexity is measured.",
                hint="leave it out, or name a source and a target (--source, --target).",
            )
    return name, columns, examples


def _score(options: EvaluateOptions, name: str, task: Task, examples: Sequence[Example]) -> Evaluation:
    """The scores of outputs that exist already.

    Raises:
        PrefixError: A file does not fit the examples, or a metric cannot be computed here.
    """
    from prefixtune.evaluation.outputs import outputs_of
    from prefixtune.evaluation.scores import score_outputs

    if task.kind != "generation" and (options.against or options.protocol or options.intervals):
        raise ConfigError(
            f"--against, --protocol, --intervals: for texts, not for {task.kind}.", hint="leave them out."
        )
    data: dict[str, Any] = {"task": name, "data": options.data, "split": options.split, "limit": options.limit}
    outputs, *other = (
        outputs_of(examples, Path(file), **data) for file in (options.outputs, options.against) if file is not None
    )
    return score_outputs(
        outputs,
        examples[: options.limit or None],
        kind=task.kind,
        protocol=options.protocol or task.protocol,
        metrics=options.metrics or None,
        intervals=options.intervals,
        samples=options.samples,
        strict=bool(options.metrics),
        against=(str(options.against), other[0]) if other else None,
    ).with_facts(method="outputs")


def _decode(
    console: Console,
    options: EvaluateOptions,
    artifact: Artifact,
    examples: Sequence[Example],
    task: Task,
    config: GenerateConfig,
    shots: Sequence[Example],
) -> Evaluation:
    """Load the model, decode and score."""
    from prefixtune.data.encoding import default_format
    from prefixtune.data.labels import labels_in
    from prefixtune.evaluation.decode import DECODED_FILE
    from prefixtune.evaluation.evaluate import evaluate as evaluate_prefix
    from prefixtune.evaluation.prompting import few_shot_format, instruction_format

    _check_computable(options, task)
    note_unused(console, options, config)
    overlap = _overlap(console, artifact, examples, shots, str(options.train))
    backbone, prefix, text_format = load_artifact(console, options, artifact)
    if options.instruction:
        text_format = instruction_format(backbone, options.instruction, shots)
    elif shots:
        text_format = few_shot_format(text_format or default_format(backbone), shots, backbone.separator, backbone.end)
    with (
        started_engine(console, options, backbone, min(config.batch_size, len(examples))) as engine,
        console.progress("generating", len(examples)) as bar,
    ):
        outcome = evaluate_prefix(
            backbone,
            examples,
            prefix,
            text_format=text_format,
            config=config,
            engine=engine,
            kind=task.kind,
            labels=labels_in(artifact.header) if artifact.weights else None,
            protocol=task.protocol,
            metrics=(options.metrics or task.metrics) if task.kind == "generation" else None,
            intervals=options.intervals,
            resume_file=Path(options.output) / DECODED_FILE if options.output else None,
            on_batch=bar.update,
            on_cut=lambda cut: console.info(f"{len(cut)} of {len(examples)} sources were truncated to fit"),
        )
    if outcome.num_unended:
        console.warn(
            f"{outcome.num_unended} of {len(examples)} outputs did not end within {config.max_new_tokens} tokens, and "
            "are scored as they are (--max-new-tokens)."
        )
    method = artifact.header.get("method", "prefix") if artifact.header else "zero-shot"
    return outcome.with_facts(
        method="few-shot" if shots else method,
        backbone=backbone.name,
        prefix=options.prefix,
        overlap=overlap,
        settings={
            "decoding": config.to_dict(),
            "text_format": None if text_format is None else text_format.to_dict(),
            "shots": options.shots,
            "limit": options.limit,
            "dtype": backbone.dtype_name,
            "engine": options.engine if engine is None else engine.name,
            "protocol": task.protocol,
        },
    )


def _check_computable(options: EvaluateOptions, task: Task) -> None:
    """Refuse a metric of --metrics that cannot be computed here; any text shows whether a program is missing."""
    from prefixtune.data import Example
    from prefixtune.evaluation.scores import score_outputs

    if options.metrics and task.kind == "generation":
        word = [Example("a word", ("a word",))]
        score_outputs(["a word"], word, protocol=task.protocol, metrics=options.metrics, strict=True)


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
    console: Console, artifact: Artifact, examples: Sequence[Example], shots: Sequence[Example], name: str
) -> Overlap | None:
    """How many examples are among the shots, or in the training sets of the prefix or the weights; None: unknown."""
    from prefixtune.evaluation.overlap import find_overlap, training_examples
    from prefixtune.training.run_folder import CONFIG_FILE

    known = list(shots)
    files = [artifact.weights] if artifact.weights else split_joined(artifact.prefix) if artifact.prefix else []
    for path in [Path(file).parent / CONFIG_FILE for file in files]:
        if path.is_file():
            try:
                config = TrainConfig.from_file(path)
                known, name = [*known, *(training_examples(config) or ())], config.train or config.task
            except PrefixError as error:
                console.info(f"not compared with the training set: {error.message}")
    if not known:
        return None
    overlap = find_overlap(examples, known, name)
    if overlap.count:
        console.warn(f"{overlap}.")
    return overlap


def _show(console: Console, options: EvaluateOptions, outcome: Evaluation) -> None:
    """Print the scores, those of groups, and how they compare."""
    for name, reason in outcome.left_out.items():
        console.warn(f"{name} is left out: {reason}")
    tables = list(score_tables(f"{outcome.num_examples:,} examples of {options.data}", outcome))
    if other := outcome.against:
        title, rows = "", []
        for name, test in other.comparison.items():
            first, second = format_score(outcome.scores[name]), format_score(other.scores[name])
            rows.append([name, first, second, f"{test.difference:+.4f}", f"{test.p_value:.4f}"])
            title = f"against {other.outputs}: {test.method}, {test.samples} samples"
        tables.append(Table(title, ["metric", "first", "second", "difference", "p"], rows))
    show({**outcome.summary(), "run": options.run_folder}, *tables, as_json=options.as_json)
