"""`prefixtune data`: what a training run would read of a file, before the run; the tasks and presets."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from prefixtune.cli.options import Conflicts, OutputOptions, command, option
from prefixtune.cli.show import outline
from prefixtune.errors import ConfigError
from prefixtune.training.config import TrainConfig
from prefixtune.utils.console import safe_text

if TYPE_CHECKING:
    from prefixtune.data import Task
    from prefixtune.evaluation.data_report import DataReport

_MAX_TEXT = 1_500
"""Characters of a piece of the example that are shown, at most; of a longer one, its beginning and its end."""
_MAX_LABELS = 12
_READ = {"backbone", "task", "form", "source", "target", "chat_template", "system", "prompt_format", "target_format"}


class DataOptions(OutputOptions, TrainConfig):
    """The options of `prefixtune data`: those of a training that change what it reads."""

    unused = TrainConfig.model_fields.keys() - _READ - {"max_length", "prefix_length", "batch_size"}

    file: str = option("", "data to look at: a file, a folder or hub:NAME; none: standard input", positional=True)
    test: str = option("", "a test file: how many of its sources are also in the data?")
    tasks: bool = option(False, "list the tasks and presets, and do nothing else")

    def conflicts(self) -> Conflicts:
        """Also: a list that has no file."""
        yield from super().conflicts()
        yield from self.apart("tasks", "file", "test")


@command
def data(options: DataOptions) -> None:
    """Look at data before a run: form, lengths, what would be cut, one example with its labels, duplicates.

    Only the backbone's tokenizer is loaded, and nothing is written.

    For example:
        prefixtune data chats.jsonl
        prefixtune data train.csv --source "{name} is {food}" --target text --test test.csv
        prefixtune data --tasks
    """
    if options.tasks:
        from prefixtune.data import TASKS

        tasks = [_describe(task) for task in TASKS.values()]
        options.show({"tasks": tasks}, *outline({task["name"]: task for task in tasks}))
        return
    from prefixtune.evaluation.data_report import report_data

    if not options.file and (sys.stdin is None or sys.stdin.isatty()):
        raise ConfigError("there is no data to look at.", hint="name a file, or send one: prefixtune data < rows.jsonl")
    config = TrainConfig(**options.given(TrainConfig), train=options.file or "-", initialization="random")
    report = report_data(config, test=options.test)
    text = "\n\n".join("\n".join(lines) for lines in _paragraphs(report, options.test))
    options.show(report.model_dump(mode="json"), text)


def _describe(task: Task) -> dict[str, Any]:
    """A task: its files, decoding and scores, and the presets that have values for it."""
    from prefixtune.training.presets import PRESETS

    return {
        "name": task.name,
        "description": task.description,
        "kind": task.kind,
        "formats": [] if task.parts else list(task.formats),
        "parts": list(task.parts),
        "takes_columns": task.form is not None,
        "decoding": task.decoding,
        "metrics": list(task.metrics),
        "protocol": task.protocol,
        "groups": list(task.groups),
        "presets": {
            name: {method: dict(values) for method, values in runs[task.name].items()}
            for name, runs in PRESETS.items()
            if task.name in runs
        },
    }


def _paragraphs(report: DataReport, test: str) -> Iterator[Iterable[str]]:
    yield [safe_text(report.read)]
    yield _length_lines(report)
    yield _limit_lines(report)
    yield _notes(report, test)
    how = "in color" if _in_color() else "in [[ ]]"
    yield [f"the first example as the model reads it, with what it learns to write {how}:", _marked(report.example)]


def _length_lines(report: DataReport) -> Iterator[str]:
    whole = report.tokenized == report.examples
    which = f"all {report.examples:,}" if whole else f"{report.tokenized:,} of {report.examples:,}"
    template = ", by its chat template" if report.chat_template else ""
    yield f"tokens of {report.backbone}{template}, in {which} examples:"
    yield f"  {'':<10}{'median':>8}{'90 %':>8}{'99 %':>8}{'longest':>9}"
    for item in report.lengths:
        yield f"  {item.what:<10}{item.median:>8,}{item.p90:>8,}{item.p99:>8,}{item.longest:>9,}"


def _limit_lines(report: DataReport) -> Iterator[str]:
    if report.positions:
        refused = (
            f", and {report.refused:,} are refused, as a target leaves no room for a source" if report.refused else ""
        )
        yield f"at {report.positions:,} positions {report.cut:,} of {report.tokenized:,} examples are cut{refused}"
    yield f"optimizer steps of an epoch: {report.steps:,}"


def _notes(report: DataReport, test: str) -> Iterator[str]:
    yield f"equal rows: {report.equal_rows:,}; equal sources with other targets: {report.equal_sources:,}"
    if report.labels:
        listed = [f"{safe_text(label)} {count:,}" for label, count in list(report.labels.items())[:_MAX_LABELS]]
        yield f"{len(report.labels):,} labels: {', '.join(listed)}{', ...' if len(report.labels) > _MAX_LABELS else ''}"
    if (overlap := report.overlap) is not None:
        yield f"sources of {test} that are also in the data: {overlap.count:,} of {overlap.num_examples:,}"


def _in_color() -> bool:
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR")


def _marked(parts: Sequence[tuple[str, bool]]) -> str:
    before, after = ("\033[1;32m", "\033[0m") if _in_color() else ("[[", "]]")
    return "".join(f"{before}{_safe(text)}{after}" if is_label else _safe(text) for text, is_label in parts)


def _safe(text: str) -> str:
    """A text for a terminal: shortened, and without characters that would steer it."""
    if len(text) > _MAX_TEXT:
        text = f"{text[: _MAX_TEXT // 2]} ... {text[-_MAX_TEXT // 2 :]}"
    return safe_text(text)
