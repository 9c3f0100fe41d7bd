"""`prefixtune score`: score the outputs of any system against the references of a task, like its official script."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from prefixtune.cli.common import check_metrics, format_score, print_json, show_scores
from prefixtune.cli.options import CommandOptions, command, form_option, json_option
from prefixtune.errors import ConfigError, DataError
from prefixtune.training.config import FormName
from prefixtune.utils.config import CommaList
from prefixtune.utils.console import Console

if TYPE_CHECKING:
    from prefixtune.data import Example
    from prefixtune.evaluation.metrics import Comparison, Measurement

__all__ = ["score"]

_LEVEL = 0.95
_LABEL_METRICS = {"classification": ("accuracy", "macro_f1"), "tagging": ("span_f1", "accuracy")}
_FOR_TEXTS = ("against", "intervals", "protocol", "samples", "seed")


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
    metrics: CommaList[str] = Field(
        (), description="such as bleu,nist (default: those of the protocol)", json_schema_extra={"metavar": "NAMES"}
    )
    protocol: Literal["", "e2e", "webnlg", "dart", "summarization", "plain"] = Field(
        "", description="how texts are prepared (default: the task's)"
    )
    intervals: bool = Field(False, description=f"bootstrap intervals of {_LEVEL:.0%}")
    samples: int = Field(1000, ge=2, le=100_000, description="draws of intervals and of the test")
    seed: int = Field(0, ge=0, description="of the draws")
    split: Literal["", "train", "dev", "test"] = Field("", description="which part, if the references are a folder")
    limit: int = Field(0, ge=0, description="only the first N examples, as `evaluate --limit`; 0: all")
    source: str | None = Field(None, description="records, classification, tagging: column or template")
    target: str | None = Field(None, description="the same, for the references")
    form: Literal["", FormName] = form_option()
    as_json: bool = json_option("the scores")
    quiet: bool = Field(False, description="no warnings, only results and errors")

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
    from prefixtune.data import TASKS, read_task, resolve_task
    from prefixtune.evaluation.evaluate import check_examples
    from prefixtune.evaluation.metrics import METRICS

    console = Console(quiet=options.quiet)
    columns: dict[str, Any] = {name: getattr(options, name) or None for name in ("source", "target", "split")} | {
        "form": options.form
    }
    options = options.replace(task=resolve_task(options.task, options.references, **columns)[0])
    examples = read_task(options.task, options.references, needs_targets=True, **columns)
    names = [name for name in (options.hypotheses, options.against) if name is not None]
    systems = [_outputs_of_examples(console, options, name, examples) for name in names]
    examples = examples[: options.limit or None]
    check_examples(examples, options.protocol or TASKS[options.task].protocol)
    kind = TASKS[options.task].kind
    check_metrics(options.metrics, METRICS if kind == "generation" else _LABEL_METRICS[kind])
    if kind == "generation":
        result = _score_texts(options, examples, systems)
    else:
        given = [name for name in _FOR_TEXTS if getattr(options, name) != options.default(name)]
        if given:
            flags = ", ".join(map(options.flag, given))
            raise ConfigError(f"{flags}: for texts, but the task {options.task!r} is {kind}.", hint="leave it out.")
        result = _score_labels(options, examples, systems[0], kind)
    result.update(num_examples=len(examples), task=options.task)
    for name, reason in result.get("left_out", {}).items():
        console.warn(f"{name} is left out: {reason}")
    if options.as_json:
        print_json(result)
    else:
        _show(console, result, options)
    return 0


def _outputs_of_examples(console: Console, options: ScoreOptions, name: str, examples: Sequence[Example]) -> list[str]:
    """The outputs of a file, one for each example, or for the first ones of --limit.

    Raises:
        DataError: Their number is neither that of the examples nor that of all entries of the references; they are rows
            without outputs; or one names the source of another example.
    """
    from prefixtune.data import read_all_entries
    from prefixtune.evaluation.outputs import check_sources, read_outputs

    outputs = read_outputs(Path(name))
    chosen = examples[: options.limit or None]
    if len(outputs) not in (len(chosen), len(examples)):
        # Perhaps for all entries, including those without a reference.
        entries = read_all_entries(options.task, options.references, split=options.split or None)
        if len(outputs) != len(entries):
            raise DataError(
                f"{name!r} has {len(outputs):,} outputs, but {options.references!r} has {len(examples):,} examples.",
                hint="write one output for each distinct source, in order; --limit N takes the first ones.",
            )
        reason = f"{len(entries) - len(examples)} of {len(entries):,} entries have no text to compare with"
        console.info(f"{name}: {reason}; the outputs for them are left out")
        outputs = [output for output, entry in zip(outputs, entries, strict=True) if entry is not None]
    outputs = outputs[: len(chosen)]
    check_sources(outputs, chosen)
    return [output.text for output in outputs]


# --- texts -----------------------------------------------------------------------------------------------------------


def _score_texts(
    options: ScoreOptions, examples: Sequence[Example], systems: Sequence[Sequence[str]]
) -> dict[str, Any]:
    """The scores of one or two systems, of groups of examples, and the test of the difference.

    Raises:
        PrefixError: A name is unknown, a metric cannot be computed here, or the outputs do not fit the examples.
    """
    from prefixtune.evaluation.metrics import Unavailable, randomize
    from prefixtune.evaluation.records import groups_to_dict, score_groups

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
            result["groups"] = groups_to_dict(groups)
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
    references = [references_of(example, protocol) for example in examples]
    measured = [
        measure(
            outputs,
            references,
            protocol=protocol,
            metrics=names,
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
    show_scores(console, f"{result['num_examples']:,} outputs of {options.hypotheses}", result, "outputs")
    if "against" not in result:
        return
    other = result["against"]
    rows = [
        [
            name,
            format_score(result["scores"][name]),
            format_score(other["scores"][name]),
            f"{comparison['difference']:+.4f}",
            f"{comparison['p_value']:.4f}",
        ]
        for name, comparison in other["comparison"].items()
    ]
    method = next(iter(other["comparison"].values()))["method"]
    console.table(
        f"against {options.against}: {method}, {options.samples} samples",
        ["metric", "first", "second", "difference", "p"],
        rows,
        result=True,
    )
