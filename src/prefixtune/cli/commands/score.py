"""`prefixtune score`: score the outputs of any system against the references of a task, like its official script."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, field_validator

from prefixtune.cli.common import MetricNames, check_metrics, print_json
from prefixtune.cli.options import CommandOptions, command, form_option, json_option
from prefixtune.errors import ConfigError, DataError, PrefixError, check_all, did_you_mean
from prefixtune.training.config import FormName
from prefixtune.utils.config import TextList
from prefixtune.utils.console import Console

if TYPE_CHECKING:
    from prefixtune.data import Example
    from prefixtune.evaluation.metrics import Comparison, Measurement
    from prefixtune.evaluation.outputs import Output

__all__ = ["score"]

_LEVEL = 0.95
_LABEL_METRICS = {"classification": ("accuracy", "macro_f1"), "tagging": ("span_f1", "accuracy")}


class ScoreOptions(CommandOptions):
    """The options of `prefixtune score`."""

    task: str = Field("records", description="the task of the references: how they are read and scored")
    hypotheses: str = Field(
        description='outputs, one a line, or .jsonl with the key "output"', json_schema_extra={"metavar": "FILE"}
    )
    references: str = Field(
        description="the task's examples, in the order of the outputs", json_schema_extra={"metavar": "FILE"}
    )
    against: str | None = Field(
        None, description="outputs of a second system: test the difference", json_schema_extra={"metavar": "FILE"}
    )
    metrics: MetricNames = Field(
        (), description="such as bleu,nist (default: those of the protocol)", json_schema_extra={"metavar": "NAMES"}
    )
    protocol: str | None = Field(
        None, description="e2e, webnlg, dart, summarization or plain: how texts are prepared (default: the task's)"
    )
    intervals: bool = Field(False, description=f"bootstrap intervals of {_LEVEL:.0%}")
    samples: int = Field(1000, ge=2, description="draws of intervals and of the test")
    seed: int = Field(0, ge=0, description="of the draws")
    weights: TextList = Field(
        (),
        description="model of bertscore: a folder, or a name of the hub",
        json_schema_extra={"metavar": "METRIC=MODEL"},
    )
    split: Literal["", "train", "dev", "test"] = Field("", description="which part, if the references are a folder")
    limit: int = Field(0, ge=0, description="only the first N examples, as `evaluate --limit`; 0: all")
    source: str | None = Field(None, description="records, classification, tagging: column or template")
    target: str | None = Field(None, description="the same, for the references")
    form: Literal["", FormName] = form_option()
    as_json: bool = json_option("the scores")
    quiet: bool = Field(False, description="no warnings, only results and errors")

    @field_validator("protocol")
    @classmethod
    def _check_protocol(cls, name: str) -> str:
        from prefixtune.evaluation.metrics import PROTOCOLS

        if name not in PROTOCOLS:
            raise ValueError(f"is {name!r}, which is no protocol ({did_you_mean(name, PROTOCOLS).removesuffix('.')})")
        return name

    @field_validator("weights")
    @classmethod
    def _check_weights(cls, texts: tuple[str, ...]) -> tuple[str, ...]:
        from prefixtune.evaluation.metrics import METRICS

        for text in texts:
            metric, _, model = text.partition("=")
            if not model:
                raise ValueError(f"has {text!r}, but METRIC=MODEL is needed, as in bertscore=models/roberta")
            if metric not in METRICS:
                raise ValueError(f"has the metric {metric!r} ({did_you_mean(metric, METRICS).removesuffix('.')})")
        return texts

    def conflicts(self) -> Iterator[tuple[tuple[str, ...], str]]:
        """Standard input is one file."""
        from prefixtune.data.streams import is_stdin

        names = tuple(name for name in ("hypotheses", "against", "references") if is_stdin(getattr(self, name) or ""))
        if len(names) > 1:
            listed = " and ".join(self.flag(name) for name in names)
            yield names, f"{listed} cannot all be - (standard input), which is one file: name the others"


@command
def score(options: ScoreOptions) -> int:
    """Score texts of any system against a data set's references.

    For example:
        prefixtune score --task e2e --hypotheses out.txt --references testset_w_refs.csv
        prefixtune score --task webnlg --hypotheses a.txt --against b.txt --references test.jsonl --metrics bleu,ter
    """
    from prefixtune.data import TASKS

    console = Console(quiet=options.quiet)
    options = _resolve_task(options)
    examples, outputs = _read_files(options)
    names = [name for name in (options.hypotheses, options.against) if name is not None]
    systems = [_outputs_of_examples(console, options, name, outputs[name], examples) for name in names]
    examples = examples[: options.limit or None]
    kind = TASKS[options.task].kind
    if kind == "generation":
        result = _score_texts(options, examples, systems)
    else:
        result = _score_labels(options, examples, systems[0], kind)
    result.update(num_examples=len(examples), task=options.task)
    for name, reason in result.get("left_out", {}).items():
        console.warn(f"{name} is left out: {reason}")
    if options.as_json:
        print_json(result)
    else:
        _show(console, result, options)
    return 0


def _resolve_task(options: ScoreOptions) -> ScoreOptions:
    """The options with the task that the references' columns show, if they are recognized."""
    from prefixtune.data import resolve_task

    split = options.split or None
    try:
        task, _, _ = resolve_task(
            options.task,
            options.references,
            source=options.source,
            target=options.target,
            split=split,
            form=options.form,
        )
    except PrefixError:
        return options  # It is said when the files are read, together with all else.
    return options.replace(task=task)


def _read_files(options: ScoreOptions) -> tuple[list[Example], dict[str, list[Output]]]:
    """All examples, and file -> its outputs; each example to be scored has a reference.

    Raises:
        PrefixError: A file cannot be read, a metric is unknown, an option is for texts only, or an example has no
            reference.
    """
    from prefixtune.data import TASKS, read_task
    from prefixtune.data.streams import shown
    from prefixtune.evaluation.metrics import METRICS
    from prefixtune.evaluation.outputs import read_outputs

    columns: dict[str, Any] = {
        "source": options.source,
        "target": options.target,
        "split": options.split or None,
        "form": options.form,
        "needs_targets": True,
    }
    examples: list[Example] = []
    outputs: dict[str, list[Output]] = {}

    def read_system(name: str) -> None:
        outputs[name] = read_outputs(Path(name))

    names = [name for name in (options.hypotheses, options.against) if name is not None]
    # An unknown task is named when its files are read.
    kind = TASKS[options.task].kind if options.task in TASKS else ""
    metrics = _LABEL_METRICS.get(kind, METRICS) if kind else ()
    check_all(
        [
            lambda: examples.extend(read_task(options.task, options.references, **columns)),
            *(partial(read_system, name) for name in names),
            *([partial(check_metrics, options.metrics, metrics)] if metrics else []),
            *([partial(_check_label_options, options, kind)] if kind in _LABEL_METRICS else []),
        ]
    )
    for number, example in enumerate(examples[: options.limit or None], start=1):
        if not example.targets:
            raise DataError(
                f"example {number} of {shown(options.references)} ({example.source[:60]!r}) has no reference.",
                hint=TASKS[options.task].targets_hint,
            )
    return examples, outputs


def _check_label_options(options: ScoreOptions, kind: str) -> None:
    """Refuse what labels and tags have no use for.

    Raises:
        ConfigError: Such an option is given.
    """
    names = ("against", "intervals", "protocol", "samples", "seed", "weights")
    given = [options.flag(name) for name in names if getattr(options, name) != options.default(name)]
    if given:
        verb, them = ("is", "it") if len(given) == 1 else ("are", "them")
        raise ConfigError(
            f"{', '.join(given)} {verb} for texts, but the task {options.task!r} is {kind}.", hint=f"leave {them} out."
        )


def _outputs_of_examples(
    console: Console, options: ScoreOptions, name: str, outputs: list[Output], examples: Sequence[Example]
) -> list[str]:
    """The outputs of a file, one for each example, or for the first ones of --limit.

    Raises:
        DataError: Their number is neither that of the examples nor that of all entries of the references; they are rows
            without outputs; or one names the source of another example.
    """
    from prefixtune.data import read_all_entries
    from prefixtune.data.streams import shown
    from prefixtune.evaluation.outputs import check_sources, check_texts

    check_texts(Path(name), outputs, examples)
    chosen = examples[: options.limit or None]
    if len(outputs) not in (len(chosen), len(examples)):
        # Perhaps for all entries, including those without a reference.
        entries = read_all_entries(options.task, options.references, split=options.split or None)
        if len(outputs) != len(entries):
            raise _wrong_count(options, name, len(outputs), len(examples), len(entries))
        reason = f"{len(entries) - len(examples)} of {len(entries):,} entries have no text to compare with"
        console.info(f"{shown(name)}: {reason}; the outputs for them are left out")
        outputs = [output for output, entry in zip(outputs, entries, strict=True) if entry is not None]
    outputs = outputs[: len(chosen)]
    check_sources(outputs, chosen)
    return [output.text for output in outputs]


def _wrong_count(options: ScoreOptions, name: str, num_outputs: int, num_examples: int, num_entries: int) -> DataError:
    """The error of outputs whose number is not that of the examples."""
    from prefixtune.data.streams import shown

    hint = "write one output a line, in the order of the examples; an empty output is an empty line."
    more = ""
    if num_entries > num_examples:
        more = f" (or {num_entries:,}, with the entries that have no text to compare with)"
    elif (num_rows := _num_merged_rows(options)) > num_examples:
        more = f" ({num_rows:,} rows, {num_examples:,} distinct sources)"
        hint = "write one output for each distinct source, in the order of their first rows."
    if num_outputs < num_examples:
        hint += f" If they are of the first {num_outputs:,} examples: --limit {num_outputs}."
    return DataError(
        f"{shown(name)} has {num_outputs:,} outputs, but {shown(options.references)} has {num_examples:,} "
        f"examples{more}; the counts must agree.",
        hint=hint,
    )


def _num_merged_rows(options: ScoreOptions) -> int:
    """The rows of the references, if those of one source are one example; otherwise 0."""
    from prefixtune.data import TASKS
    from prefixtune.data.files import iter_file
    from prefixtune.data.folders import locate

    task = TASKS[options.task]
    if not task.merges:
        return 0
    file = locate(Path(options.references), options.split or None, task.formats, task.release)
    return sum(1 for _ in iter_file(file))


# --- texts -----------------------------------------------------------------------------------------------------------


def _score_texts(
    options: ScoreOptions, examples: Sequence[Example], systems: Sequence[Sequence[str]]
) -> dict[str, Any]:
    """The scores of one or two systems, of groups of examples, and the test of the difference.

    Raises:
        PrefixError: A name is unknown, a metric cannot be computed here, or the outputs do not fit the examples.
    """
    from prefixtune.evaluation.metrics import Unavailable, randomize
    from prefixtune.evaluation.records import score_groups

    draws: dict[str, Any] = {"samples": options.samples, "seed": options.seed}
    level = _LEVEL if options.intervals else None
    left_out: dict[str, str] = {}
    try:
        protocol, (first, *others) = _measure(options, examples, systems, left_out)
        result: dict[str, Any] = {
            "scores": {name: metric.to_score(level=level, **draws).to_dict() for name, metric in first.items()},
            "protocol": protocol,
        }
        if groups := score_groups(first, examples):
            result["groups"] = {
                grouping: {
                    group: {
                        "num_examples": part.num_examples,
                        "scores": {name: score.to_dict() for name, score in part.scores.items()},
                    }
                    for group, part in parts.items()
                }
                for grouping, parts in groups.items()
            }
        for other in others:
            result["against"] = {
                "hypotheses": options.against,
                "scores": {name: metric.to_score(level=level, **draws).to_dict() for name, metric in other.items()},
                "comparison": {name: _comparison_json(randomize(first[name], other[name], **draws)) for name in first},
            }
    except Unavailable as error:
        raise ConfigError(f"{error.reason}.", hint=f"{error.remedy}.") from error
    except ValueError as error:
        raise DataError(f"the outputs cannot be scored: {error}.", hint="check both files.") from error
    if left_out:
        result["left_out"] = left_out
    return result


def _measure(
    options: ScoreOptions,
    examples: Sequence[Example],
    systems: Sequence[Sequence[str]],
    left_out: dict[str, str],
) -> tuple[str, list[dict[str, Measurement]]]:
    """The protocol, and the metrics of every system, the same of each; the other default metrics go to `left_out`.

    Raises:
        ConfigError: A name is unknown, or no metric can be computed here.
        Unavailable: A metric of --metrics cannot be computed here.
        ValueError: The outputs cannot be scored.
    """
    from prefixtune.data import TASKS, references_of
    from prefixtune.evaluation.metrics import measure

    protocol = options.protocol or TASKS[options.task].protocol
    names = options.metrics or None
    weights = dict(text.split("=", 1) for text in options.weights)
    references = [references_of(example, protocol) for example in examples]
    measured = [
        measure(
            outputs,
            references,
            protocol=protocol,
            metrics=names,
            weights=weights,
            left_out=left_out if names is None else None,
        )
        for outputs in systems
    ]
    # What cannot be computed of one system cannot be compared.
    measured = [{name: one[name] for name in one if all(name in other for other in measured)} for one in measured]
    if not measured[0]:
        reason, _, remedy = next(iter(left_out.values())).partition("; ")
        raise ConfigError(f"no metric can be computed here: {reason}.", hint=f"{remedy}.")
    return protocol, measured


def _comparison_json(comparison: Comparison) -> dict[str, Any]:
    return {name: getattr(comparison, name) for name in ("difference", "p_value", "samples", "method")}


# --- labels and tags -------------------------------------------------------------------------------------------------


def _score_labels(
    options: ScoreOptions, examples: Sequence[Example], outputs: Sequence[str], kind: str
) -> dict[str, Any]:
    """Accuracy and F1 of lines of labels, or of tags separated by spaces.

    Raises:
        DataError: The outputs do not fit the examples.
    """
    from prefixtune.evaluation.metrics import accuracy, macro_f1, span_f1

    names = options.metrics or _LABEL_METRICS[kind]
    predicted = [output.strip() for output in outputs]
    expected = [example.targets[0] for example in examples]
    try:
        if kind == "classification":
            scores = {"accuracy": accuracy(predicted, expected), "macro_f1": macro_f1(predicted, expected)}
        else:
            rows, expected_rows = [line.split() for line in predicted], [line.split() for line in expected]
            flat, expected_flat = ([tag for row in tags for tag in row] for tags in (rows, expected_rows))
            scores = {"span_f1": span_f1(rows, expected_rows), "accuracy": accuracy(flat, expected_flat)}
    except ValueError as error:
        raise DataError(f"the outputs cannot be scored: {error}.", hint="check both files.") from error
    return {"scores": {name: scores[name].to_dict() for name in names}}


# --- on the terminal -------------------------------------------------------------------------------------------------


def _show(console: Console, result: Mapping[str, Any], options: ScoreOptions) -> None:
    """Print tables of the scores, of the groups and of the comparison."""
    from prefixtune.data.streams import shown

    scores = result["scores"]
    rows = [[name, _format_score(score), score["implementation"]] for name, score in scores.items()]
    title = f"{result['num_examples']:,} outputs of {shown(options.hypotheses)}"
    console.table(title, ["metric", "score", "implementation"], rows, result=True)
    for grouping, groups in result.get("groups", {}).items():
        rows = [
            [name, f"{group['num_examples']:,}", *(_format_score(score) for score in group["scores"].values())]
            for name, group in groups.items()
        ]
        names = next(iter(groups.values()))["scores"]
        console.table("", [grouping, "outputs", *names], rows, result=True)
    if "against" in result:
        other = result["against"]
        method = next(iter(other["comparison"].values()))["method"]
        rows = [
            [
                name,
                _format_score(scores[name]),
                _format_score(other["scores"][name]),
                f"{comparison['difference']:+.4f}",
                f"{comparison['p_value']:.4f}",
            ]
            for name, comparison in other["comparison"].items()
        ]
        console.table(
            f"against {shown(options.against or '')}: {method}, {options.samples} samples",
            ["metric", "first", "second", "difference", "p"],
            rows,
            result=True,
        )


def _format_score(score: Mapping[str, Any]) -> str:
    text = f"{score['score']:.4f}"
    return text if "interval" not in score else "{} ({:.4f} to {:.4f})".format(text, *score["interval"])
