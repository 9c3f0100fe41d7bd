"""`prefixtune score`: outputs of any system against the references of a task, as its official script scores them.

Knows nothing of models, and of how a score is computed: texts come from files and go to `evaluation.metrics`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefixtune.cli.common import AddCommand
from prefixtune.errors import ConfigError, DataError, did_you_mean
from prefixtune.utils.console import Console

if TYPE_CHECKING:
    from prefixtune.data import Example
    from prefixtune.evaluation.metrics import Comparison, Measurement, Score

__all__ = ["add_arguments", "run"]


_LEVEL = 0.95
_LABEL_METRICS = {"classification": ("accuracy", "macro_f1"), "tagging": ("span_f1", "accuracy")}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What `prefixtune score` takes."""
    parser.add_argument("--task", required=True, help="whose files the references are, and how they are scored")
    parser.add_argument(
        "--hypotheses", required=True, metavar="FILE", help='outputs, one a line, or .jsonl with the key "output"'
    )
    parser.add_argument(
        "--references", required=True, metavar="FILE", help="the task's examples, in the order of the outputs"
    )
    parser.add_argument("--against", metavar="FILE", help="outputs of a second system: test the difference")
    parser.add_argument("--metrics", metavar="NAMES", help="as in bleu,nist (default: those of the protocol)")
    parser.add_argument(
        "--protocol", help="e2e, webnlg, dart, summarization or plain: how texts are prepared (default: the task's)"
    )
    parser.add_argument(
        "--intervals", action="store_true", help=f"bootstrap intervals of {_LEVEL:.0%}".replace("%", "%%")
    )
    parser.add_argument(
        "--samples", type=int, default=1000, metavar="N", help="draws of intervals and of the test (default: 1000)"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the draws (default: 0)")
    parser.add_argument(
        "--weights",
        action="append",
        default=[],
        metavar="METRIC=FOLDER",
        help="model weights of bertscore, moverscore or bleurt; repeatable; none are fetched",
    )
    parser.add_argument("--split", help="train, dev or test, where the references are a folder of several")
    parser.add_argument("--source", help="records, classification, tagging: column or template")
    parser.add_argument("--target", help="likewise, of the references")
    parser.add_argument("--json", action="store_true", help="print the scores as JSON on stdout")
    parser.add_argument("--quiet", action="store_true", help="no warnings, only results and errors")


def run(options: argparse.Namespace) -> int:
    """`prefixtune score`."""
    from prefixtune.data import TASKS, read_all_entries, read_task

    if options.samples < 2 or options.seed < 0:
        raise ConfigError(
            f"--samples is {options.samples} and --seed is {options.seed}, but must be at least 2 and 0.",
            hint="1,000 samples are usual.",
        )
    console = Console(quiet=options.quiet)
    examples = read_task(
        options.task, options.references, source=options.source, target=options.target, split=options.split
    )
    for number, example in enumerate(examples, start=1):
        if not example.targets:
            raise DataError(
                f"example {number} of {options.references} ({example.source[:60]!r}) has no reference.",
                hint="name a file with references, or the column with --target.",
            )
    systems = []
    for name in (options.hypotheses, options.against):
        if name is None:
            continue
        outputs = _read_outputs(Path(name))
        if len(outputs) != len(examples):
            # Maybe of all entries, also of those that are no examples.
            entries = read_all_entries(options.task, options.references, split=options.split)
            if len(outputs) != len(entries):
                raise _other_count(name, len(outputs), len(examples), len(entries), options.references)
            outputs = [output for output, entry in zip(outputs, entries, strict=True) if entry is not None]
            told = f"{len(entries) - len(examples)} of {len(entries):,} entries have no text to compare with"
            console.info(f"{name}: {told}; the outputs for them are left out")
        systems.append(outputs)
    kind = TASKS[options.task].kind
    if kind == "generation":
        result = _score_texts(options, examples, systems)
    else:
        result = _score_labels(options, examples, systems[0], kind)
    result.update(num_examples=len(examples), task=options.task)
    for name, reason in result.get("left_out", {}).items():
        console.warn(f"{name} is left out: {reason}")
    if options.json:
        print(json.dumps(result, ensure_ascii=False), flush=True)
    else:
        _show(console, result, options)
    return 0


def _read_outputs(path: Path) -> list[str]:
    """One text an item: lines as they are, blank ones too, or the outputs of JSON lines."""
    from prefixtune.data.files import check_file, read_rows, read_text

    check_file(path)
    name = path.name.lower().removesuffix(".gz")
    if name.endswith(".json"):
        raise DataError(
            f"{path} is JSON, but outputs are read from lines.",
            hint='write one output a line (.txt), or lines of {"output": "..."} (.jsonl).',
        )
    if name.endswith(".jsonl"):
        outputs = []
        for row in read_rows(path, (".jsonl",)):
            output = row.values.get("output")
            if not isinstance(output, str):
                raise DataError(
                    f"{row.where}: 'output' is {output!r}; a text is needed.", hint='write lines as {"output": "..."}.'
                )
            outputs.append(output)
    else:
        # Only "\n" ends a line; the last one's is no further, empty output.
        outputs = [line.removesuffix("\r") for line in read_text(path).removesuffix("\n").split("\n")]
    return outputs


def _other_count(name: str, found: int, wanted: int, entries: int, references: str) -> DataError:
    or_entries = f" (or {entries:,}, with the entries that have no text to compare with)" if entries > wanted else ""
    return DataError(
        f"{name} has {found:,} outputs, but {references} has {wanted:,} examples{or_entries}; the counts must agree.",
        hint="write one output a line, in the order of the examples; an empty output is an empty line.",
    )


# --- texts -----------------------------------------------------------------------------------------------------------


def _score_texts(
    options: argparse.Namespace, examples: Sequence[Example], systems: Sequence[Sequence[str]]
) -> dict[str, Any]:
    from prefixtune.data import TASKS, references_of
    from prefixtune.evaluation.metrics import METRICS, PROTOCOLS, Unavailable, measure, randomize

    protocol = options.protocol or TASKS[options.task].protocol
    if protocol not in PROTOCOLS:
        raise ConfigError(f"there is no protocol {protocol!r}.", hint=did_you_mean(protocol, PROTOCOLS))
    names = _asked(options.metrics, list(METRICS))
    weights = dict(_weight(text, METRICS) for text in options.weights)
    references = [references_of(example, protocol) for example in examples]
    left_out: dict[str, str] = {}
    try:
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
        first = measured[0]
        if not first:
            reason, _, remedy = next(iter(left_out.values())).partition("; ")
            raise ConfigError(f"no metric can be computed here: {reason}.", hint=f"{remedy}.")
        draws: dict[str, Any] = {"samples": options.samples, "seed": options.seed}
        level = _LEVEL if options.intervals else None
        result: dict[str, Any] = {
            "scores": {name: _as_json(one.to_score(level=level, **draws)) for name, one in first.items()},
            "protocol": protocol,
        }
        groups = _groups(examples, first)
        if groups:
            result["groups"] = groups
        for other in measured[1:]:
            result["against"] = {
                "hypotheses": options.against,
                "scores": {name: _as_json(one.to_score(level=level, **draws)) for name, one in other.items()},
                "comparison": {name: _compared(randomize(first[name], other[name], **draws)) for name in first},
            }
    except Unavailable as error:
        raise ConfigError(f"{error.reason}.", hint=f"{error.remedy}.") from error
    except ValueError as error:
        raise DataError(f"the outputs cannot be scored: {error}.", hint="check both files.") from error
    if left_out:
        result["left_out"] = left_out
    return result


def _asked(given: str | None, known: Sequence[str]) -> list[str] | None:
    """The metrics that were asked for; None: none in particular."""
    if given is None:
        return None
    names = [name.strip() for name in given.split(",") if name.strip()]
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        what = unknown[0] if unknown else given
        raise ConfigError(f"there is no metric {what!r} for this task.", hint=did_you_mean(what, known))
    return names


def _weight(text: str, known: Iterable[str]) -> tuple[str, str]:
    metric, sign, folder = text.partition("=")
    if sign and metric not in known:
        raise ConfigError(f"--weights names the metric {metric!r}.", hint=did_you_mean(metric, known))
    if not sign or not folder:
        raise ConfigError(f"--weights is {text!r}, but must be METRIC=FOLDER.", hint="as in bertscore=models/roberta.")
    return metric, folder


def _groups(examples: Sequence[Example], measured: Mapping[str, Measurement]) -> dict[str, Any]:
    """The scores of every group of examples: numbers in their order, names in that of first appearance."""
    members: dict[str, dict[str, list[int]]] = {}
    for number, example in enumerate(examples):
        for grouping, group in example.groups.items():
            members.setdefault(grouping, {}).setdefault(group, []).append(number)
    return {
        grouping: {
            group: {
                "num_examples": len(numbers),
                "scores": {name: _as_json(one.part(numbers).to_score()) for name, one in measured.items()},
            }
            for group, numbers in sorted(groups.items(), key=lambda item: int(item[0]) if item[0].isdecimal() else 0)
        }
        for grouping, groups in members.items()
    }


def _as_json(one: Score) -> dict[str, Any]:
    made = {"score": one.score, "implementation": one.implementation, "higher_is_better": one.higher_is_better}
    return made if one.interval is None else {**made, "interval": list(one.interval)}


def _compared(one: Comparison) -> dict[str, Any]:
    return {"difference": one.difference, "p_value": one.p_value, "samples": one.samples, "method": one.method}


# --- labels and tags -------------------------------------------------------------------------------------------------


def _score_labels(
    options: argparse.Namespace, examples: Sequence[Example], outputs: Sequence[str], kind: str
) -> dict[str, Any]:
    """Accuracy and F1 of lines that are labels, or tags with a space between."""
    from prefixtune.evaluation.metrics import accuracy, macro_f1, span_f1

    for option, given in (("--against", options.against), ("--intervals", options.intervals)):
        if given:
            raise ConfigError(f"{option} is for texts, but the task {options.task!r} is {kind}.", hint="leave it out.")
    known = _LABEL_METRICS[kind]
    names = _asked(options.metrics, known) or known
    told = [output.strip() for output in outputs]
    wanted = [example.targets[0] for example in examples]
    try:
        if kind == "classification":
            made = {"accuracy": accuracy(told, wanted), "macro_f1": macro_f1(told, wanted)}
        else:
            rows, others = [line.split() for line in told], [line.split() for line in wanted]
            made = {"span_f1": span_f1(rows, others)}
            made["accuracy"] = accuracy([tag for row in rows for tag in row], [tag for row in others for tag in row])
    except ValueError as error:
        raise DataError(f"the outputs cannot be scored: {error}.", hint="check both files.") from error
    return {"scores": {name: _as_json(made[name]) for name in names}}


# --- on the terminal -------------------------------------------------------------------------------------------------


def _show(console: Console, result: Mapping[str, Any], options: argparse.Namespace) -> None:
    def figure(found: Mapping[str, Any]) -> str:
        text = f"{found['score']:.4f}"
        return text if "interval" not in found else "{} ({:.4f} to {:.4f})".format(text, *found["interval"])

    scores = result["scores"]
    rows = [[name, figure(found), found["implementation"]] for name, found in scores.items()]
    title = f"{result['num_examples']:,} outputs of {options.hypotheses}"
    console.table(title, ["metric", "score", "implementation"], rows, result=True)
    for grouping, groups in result.get("groups", {}).items():
        cells = [
            [group, f"{found['num_examples']:,}", *(figure(one) for one in found["scores"].values())]
            for group, found in groups.items()
        ]
        console.table("", [grouping, "outputs", *scores], cells, result=True)
    if "against" in result:
        other = result["against"]
        method = next(iter(other["comparison"].values()))["method"]
        rows = [
            [
                name,
                figure(scores[name]),
                figure(other["scores"][name]),
                f"{one['difference']:+.4f}",
                f"{one['p_value']:.4f}",
            ]
            for name, one in other["comparison"].items()
        ]
        console.table(
            f"against {options.against}: {method}, {options.samples} samples",
            ["metric", "first", "second", "difference", "p"],
            rows,
            result=True,
        )


def register(command: AddCommand) -> None:
    """Add the command and its options to the command line."""
    parser = command(
        "score",
        run,
        "score texts of any system against a data set's references",
        """

examples:
  prefixtune score --task e2e --hypotheses out.txt --references testset_w_refs.csv
  prefixtune score --task webnlg --hypotheses a.txt --against b.txt --references test.jsonl --metrics bleu,ter""",
    )
    add_arguments(parser)
