"""`prefixtune evaluate`: decode for every example of a file, or take outputs that exist, and score them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from prefixtune.cli.decoding import DecodingOptions
from prefixtune.cli.loading import Trained, load_trained, read_as_trained, read_trained, started_engine
from prefixtune.cli.options import PREFIX, Conflicts, OutputOptions, PathText, ReadingOptions, command, option
from prefixtune.cli.show import Table, format_score, score_tables
from prefixtune.errors import ConfigError, PrefixError
from prefixtune.utils.config import CommaList

if TYPE_CHECKING:
    from prefixtune.backbone.backbone import Backbone
    from prefixtune.data import Example, Task
    from prefixtune.data.labels import Labels
    from prefixtune.inference.config import GenerateConfig
    from prefixtune.prefix.text_format import TextFormat
    from prefixtune.results import Evaluation, Overlap


class EvaluateOptions(DecodingOptions, ReadingOptions):
    """The options of `prefixtune evaluate`."""

    prefix: PathText | None = option(None, f"{PREFIX}; none: the bare model", metavar="FILE")
    run_folder: PathText | None = option(
        None, "a run of `prefixtune train`, with any method", flag="run", metavar="FOLDER"
    )
    data: str = option(description="examples with references: a file, a folder, hub:NAME, or - (stdin)", metavar="PATH")
    limit: int = option(0, "only the first N examples; 0: all", ge=0)
    shots: int = option(0, "show N solved examples of --train before each", ge=0)
    train: PathText | None = option(None, "where the examples of --shots come from", metavar="PATH")
    instruction: str = option("", "ask the bare model in words, in its chat template where it has one")
    metrics: CommaList[str] = option((), "such as bleu,nist,meteor (default: the task's)", metavar="NAMES")
    intervals: bool = option(False, "also give 95 % bootstrap intervals")
    output: PathText | None = option(
        None, "write scores, outputs and settings there; a stopped evaluation goes on", metavar="FOLDER"
    )
    outputs: PathText | None = option(
        None, 'score these, and decode nothing: one a line, or .jsonl with the key "output"', metavar="FILE"
    )
    against: PathText | None = option(
        None, "outputs of a second system: test the difference from --outputs", metavar="FILE"
    )
    protocol: Literal["", "e2e", "webnlg", "dart", "summarization", "plain"] = option(
        "", "of --outputs: by whose rules texts are scored (default: the task's)"
    )

    def conflicts(self) -> Conflicts:
        """Options that do not go together."""
        yield from super().conflicts()
        yield from self.apart("run_folder", "prefix", "shots", "instruction")
        yield from self.apart("prefix", "shots", "instruction")
        decoding = DecodingOptions.model_fields.keys() - OutputOptions.model_fields
        yield from self.apart("outputs", "prefix", "run_folder", "shots", "instruction", *sorted(decoding))
        yield from self.only_with("outputs", "against", "protocol")
        written = Path(self.output or "", "outputs.jsonl").resolve()
        if self.limit and self.outputs and Path(self.outputs).resolve() == written:
            yield ("output", "outputs"), "--output would shorten the file of --outputs to --limit outputs"
        if self.output and self.against and Path(self.against).resolve() == written:
            yield ("output", "against"), "--output would write over the file of --against"
        yield from self.only_with("train", "shots")
        yield from self.only_with("shots", "train")


@command
def evaluate(options: EvaluateOptions) -> None:
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

    # Everything that can be wrong is reported before the model loads.
    trained = read_trained(options, [options.prefix] if options.prefix else [], options.run_folder)
    header = trained.headers[0]
    name, examples = _read_examples(options, header)
    task, scored = TASKS[name], examples[: options.limit or None]
    protocol = options.protocol or task.protocol
    check_examples(scored, protocol)
    check_metrics(options.metrics or None, kind=task.kind, protocol=protocol)
    if options.output:
        check_writable(Path(options.output) / "any")
    if options.outputs:
        outcome = _score(options, task, examples)
    else:
        config = options.configuration(trained.headers, name)
        if options.print_config:
            print(config.to_toml().rstrip())
            return
        outcome = _decode(options, trained, examples, task, config, _read_shots(options, header))
    split = f" ({options.split})" if options.split else ""
    of = options.outputs or options.run_folder or options.prefix or options.backbone or "the bare model"
    outcome = outcome.with_facts(
        title=f"{of} on {name}{split}", task=name, data=Path(options.data).name, split=options.split or None
    )
    if options.output:
        write_evaluation(Path(options.output), outcome, scored, protocol=protocol)
        options.console.info(f"scores, outputs and settings: {options.output}")
    for metric, reason in outcome.left_out.items():
        options.console.warn(f"{metric} is left out: {reason}")
    options.show({**outcome.summary(), "run": options.run_folder}, *_tables(options, outcome))


def _read_examples(options: EvaluateOptions, header: Mapping[str, Any]) -> tuple[str, list[Example]]:
    """The task's name, and the examples; a line says how data of one's own is read.

    Raises:
        ConfigError: An option is for texts that are generated, but the data is texts alone.
    """
    from prefixtune.data.forms import describe_data

    read = read_as_trained(options, header, options.data, options.split or None, needs_targets=True)
    if read.form is not None:
        options.console.info(describe_data(read.form, read.examples, options.data, read.columns))
        given = [options.flag(name) for name in ("metrics", "shots", "instruction") if options.has(name)]
        given += options.of_writing
        if read.form.name == "text" and given:
            raise ConfigError(
                f"{', '.join(given)}: not for texts alone, whose perplexity is measured.",
                hint="leave it out, or name a source and a target (--source, --target).",
            )
    return read.task, read.examples


def _score(options: EvaluateOptions, task: Task, examples: Sequence[Example]) -> Evaluation:
    """The scores of outputs that exist already.

    Raises:
        PrefixError: A file does not fit the examples, or a metric cannot be computed here.
    """
    from prefixtune.evaluation.scores import outputs_of, score_outputs

    if task.kind != "generation" and (options.against or options.protocol or options.intervals):
        raise ConfigError(
            f"--against, --protocol, --intervals: for texts, not for {task.kind}.", hint="leave them out."
        )
    outputs, *other = (
        outputs_of(examples, Path(file), data=options.data, limit=options.limit)
        for file in (options.outputs, options.against)
        if file is not None
    )
    return score_outputs(
        outputs,
        examples[: options.limit or None],
        kind=task.kind,
        protocol=options.protocol or task.protocol,
        metrics=options.metrics or None,
        intervals=options.intervals,
        strict=bool(options.metrics),
        against=(str(options.against), other[0]) if other else None,
    ).with_facts(method="outputs")


def _decode(
    options: EvaluateOptions,
    trained: Trained,
    examples: Sequence[Example],
    task: Task,
    config: GenerateConfig,
    shots: Sequence[Example],
) -> Evaluation:
    """Load the model, decode and score."""
    from prefixtune.data import Example
    from prefixtune.data.labels import labels_in
    from prefixtune.evaluation.decode import DECODED_FILE
    from prefixtune.evaluation.evaluate import evaluate as evaluate_prefix
    from prefixtune.evaluation.scores import score_outputs

    console, header = options.console, trained.headers[0]
    labels = labels_in(header) if trained.weights else None
    # The bare model chooses among the labels of the whole file.
    labels = _check(options, trained, labels, examples, task, shots)
    examples = examples[: options.limit or None]
    if options.metrics and task.kind == "generation":
        # Whether a program is missing that a metric needs, or a metric cannot read the references.
        word = [Example("a word", (" ".join(text for one in examples for text in one.targets)[:100_000],))]
        score_outputs(["a word"], word, protocol=task.protocol, metrics=options.metrics, strict=True)
    overlap = _overlap(options, trained, examples, shots)
    backbone, prefixes, text_format = load_trained(options, trained)
    text_format = _prompting(options, backbone, shots) or text_format
    with (
        started_engine(options, backbone, len(examples), config.batch_size) as engine,
        console.progress("generating", len(examples)) as bar,
    ):
        outcome = evaluate_prefix(
            backbone,
            examples,
            next(iter(prefixes), None),
            text_format=text_format,
            config=config,
            engine=engine,
            kind=task.kind,
            labels=labels,
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
    settings = {
        "decoding": config.to_dict(),
        "text_format": None if text_format is None else text_format.to_dict(),
        **{name: getattr(options, name) for name in ("shots", "limit")},
        "dtype": backbone.dtype_name,
        "engine": options.engine if engine is None else engine.name,
        "protocol": task.protocol,
    }
    method = "few-shot" if shots else header.get("method", "prefix") if header else "zero-shot"
    scores = {name: one for name, one in outcome.scores.items() if name in (options.metrics or outcome.scores)}
    facts = {"method": method, "scores": scores, "prefix": options.prefix, "overlap": overlap, "settings": settings}
    return outcome.with_facts(backbone=backbone.name, **facts)


def _check(
    options: EvaluateOptions,
    trained: Trained,
    labels: Labels | None,
    examples: Sequence[Example],
    task: Task,
    shots: Sequence[Example],
) -> Labels | None:
    """Refuse labels, an engine or an instruction that do not go with the rest; returns the labels to choose from."""
    from prefixtune.evaluation.evaluate import check_literal, labels_to_predict

    how: dict[str, Any] = {"intervals": options.intervals, "engine": options.engine}
    found = labels_to_predict(labels, next(iter(trained.prefixes), None), task.kind, examples, **how)
    if found is not None and options.of_writing:
        raise ConfigError(f"{', '.join(options.of_writing)}: not where labels are chosen.", hint="leave it out.")
    check_literal(options.instruction, shots)
    return None if trained.prefixes else found


def _prompting(options: EvaluateOptions, backbone: Backbone, shots: Sequence[Example]) -> TextFormat | None:
    """The text format that asks the bare model; None: it is not asked."""
    from prefixtune.data.encoding import default_format
    from prefixtune.evaluation.evaluate import few_shot_format, instruction_format

    if options.instruction:
        return instruction_format(backbone, options.instruction, shots)
    return few_shot_format(default_format(backbone), shots, backbone.separator, backbone.end) if shots else None


def _read_shots(options: EvaluateOptions, header: Mapping[str, Any]) -> list[Example]:
    """The solved examples of --shots.

    Raises:
        ConfigError: There are too few.
    """
    if not options.shots or options.train is None:
        return []
    examples = read_as_trained(options, header, options.train, "train").examples
    shots = [example for example in examples if example.targets][: options.shots]
    if len(shots) < options.shots:
        raise ConfigError(
            f"--shots is {options.shots}, but {options.train!r} has {len(shots)} examples with a target.",
            hint="show fewer.",
        )
    return shots


def _overlap(
    options: EvaluateOptions, trained: Trained, examples: Sequence[Example], shots: Sequence[Example]
) -> Overlap | None:
    """How many examples are among the shots, or in the training sets of the prefix or the weights; None: unknown."""
    from prefixtune.evaluation.data_report import find_overlap, training_examples
    from prefixtune.training.config import TrainConfig
    from prefixtune.training.run_folder import CONFIG_FILE

    known, name = list(shots), str(options.train)
    for file in [trained.weights] if trained.weights else trained.read:
        if (path := Path(file).parent / CONFIG_FILE).is_file():
            try:
                config = TrainConfig.from_file(path)
                known, name = [*known, *(training_examples(config) or ())], config.train or config.task
            except (PrefixError, OSError) as error:
                options.console.info(f"not compared with the training set: {getattr(error, 'message', error)}")
    if not known:
        return None
    overlap = find_overlap(examples, known, name)
    if overlap.count:
        options.console.warn(f"{overlap}.")
    return overlap


def _tables(options: EvaluateOptions, outcome: Evaluation) -> Iterator[Table]:
    """The scores, those of groups, and how they compare."""
    yield from score_tables(f"{outcome.num_examples:,} examples of {options.data}", outcome)
    if other := outcome.against:
        title, rows = "", []
        for name, test in other.comparison.items():
            first, second = format_score(outcome.scores[name]), format_score(other.scores[name])
            rows.append([name, first, second, f"{test.difference:+.4f}", f"{test.p_value:.4f}"])
            title = f"against {other.outputs}: {test.method}, {test.samples} samples"
        yield Table(title, ["metric", "first", "second", "difference", "p"], rows)
