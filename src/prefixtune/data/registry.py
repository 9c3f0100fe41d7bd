"""The tasks by name: how each is read, and how its outputs are decoded and scored by default."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prefixtune.data.benchmarks import dart_example, e2e_example, scitldr_example, webnlg_examples
from prefixtune.data.examples import Example, TaskKind, merge_examples
from prefixtune.data.files import FORMATS, Record, iter_file
from prefixtune.data.forms import FORMS, TEMPLATES, Form, check_template, detect_form, make_example
from prefixtune.data.sets import Release, files_in, locate
from prefixtune.data.streams import shown
from prefixtune.data.toy import make_toy
from prefixtune.errors import ConfigError, DataError, did_you_mean, short_repr
from prefixtune.prefix.text_format import read_text_format

Reader = Callable[[Iterable[Record]], list[Example]]
"""Rows -> examples; a row without a good text has none."""


@dataclass(frozen=True)
class Task:
    """One kind of data.

    Attributes:
        name: As in a configuration.
        description: One line for users.
        read: Of benchmarks; None: it is made here, or its rows have a form.
        decoding: Fields of `GenerateConfig` by name; copy it before changing it.
        kind: What a target is.
        parts: Of a set that is made here: the names that are used instead of a path, the training part first.
        metrics: The usual scores, by name, the main one first.
        protocol: By whose rules texts are prepared for scoring: those of `e2e`, `webnlg`, `dart`, `summarization`; or
            `plain`.
        groups: The names of the groupings that an example may have (`Example.groups`), for which scores are also
            reported.
        formats: The endings of the files that are read, each also with `.gz`.
        release: The names of the files in the original release.
        form: Of its rows, whose columns source and target may name (templates); None: it has a format of its own.
    """

    name: str
    description: str
    read: Reader | None = None
    decoding: dict[str, Any] = field(default_factory=lambda: {"num_beams": 1, "max_new_tokens": 100})
    kind: TaskKind = "generation"
    parts: tuple[str, ...] = ()
    metrics: tuple[str, ...] = ("bleu",)
    protocol: str = "plain"
    groups: tuple[str, ...] = ()
    formats: tuple[str, ...] = FORMATS
    release: Release = field(default_factory=dict)
    form: Form | None = None


@dataclass(frozen=True)
class Reading:
    """What a file holds.

    Attributes:
        task: That the data belong to.
        form: That was recognized; None: the task or templates say how rows are read.
        columns: Of the first row; empty without a form.
        examples: All of them.
    """

    task: str
    form: Form | None
    columns: tuple[str, ...]
    examples: list[Example]


def read_data(
    task: str,
    path: Path | str,
    *,
    source: str | None = None,
    target: str | None = None,
    split: str | None = None,
    form: str = "",
    prefer: str = "",
    needs_targets: bool = False,
) -> Reading:
    """Read the examples of a task, and say how.

    Args:
        task: A name of `TASKS`; `records` without `source`: the data's form is recognized (see `forms`).
        path: A file; `-` for standard input; a folder of files, or one that the `datasets` library saved; or
            `hub:NAME`. For the set made here (`toy`): `train` or `held_out`.
        source: Template of the source, for `records`, `classification` and `summarization`; for `tagging` the
            name of a column.
        target: Template of the target, likewise.
        split: `train`, `dev` or `test`: which part of a folder or set to read; ignored for a file and for a set made
            here.
        form: For `records` without `source`: the form that the data must have; empty: any that fits.
        prefer: Likewise: the form that is taken if it fits, whatever else does.
        needs_targets: Likewise: an example without a target is refused.

    Raises:
        ConfigError: The task, the form or the split is unknown; a template is missing, malformed, or given to a task
            that takes none; several forms fit; or the `datasets` library is needed and not installed.
        DataError: The file or one of its rows is wrong; or the folder has no such split, or several and none was
            named.
    """
    chosen = _chosen(task, source, target, form)
    if chosen.parts:
        # A part of a set made here is not a path, even if a folder has its name.
        if str(path) not in chosen.parts:
            what = f"task {task!r} has no part {short_repr(str(path))}."
            raise ConfigError(what, hint=did_you_mean(str(path), chosen.parts))
        return Reading(task, None, (), make_toy()[chosen.parts.index(str(path))])
    with contextlib.closing(_records(chosen, path, split)) as rows:
        if chosen.read is not None:
            if not (found := chosen.read(rows)):
                raise DataError(f"{shown(path)} has no text that counts.", hint="check that it is complete.")
            return Reading(task, None, (), found)
        first = next(rows)
        one_form, recognized = chosen.form or TEMPLATES, None
        options: dict[str, Any] = {"needs_targets": task != "records" or target is not None}
        if task == "records" and source is None:
            options = {"needs_targets": needs_targets}
            one_form = recognized = detect_form(first.values, first.location, form=form, prefer=prefer, **options)
        made = [
            make_example(row, one_form, templates=(source, target), **options) for row in itertools.chain([first], rows)
        ]
    # Each row of a named task counts, as in the published figures of test sets.
    examples = merge_examples(made) if one_form.task == "records" else made
    return Reading(one_form.task, recognized, tuple(map(str, first.values)) if recognized else (), examples)


def read_task(task: str, path: Path | str, **options: Any) -> list[Example]:
    """The examples of a task; the arguments of `read_data`.

    >>> len(read_task("toy", "train")), len(read_task("toy", "held_out"))
    (320, 40)
    """
    return read_data(task, path, **options).examples


def _chosen(name: str, source: str | None, target: str | None, form: str) -> Task:
    """The task of that name; what does not go with it is refused.

    Raises:
        ConfigError: The task or the form is unknown, a template is malformed or has no use, or the form has none.
    """
    for value, known in ((name, TASKS), (form, FORMS)):
        if value not in known and (value or known is TASKS):
            what = "form" if known is FORMS else "task"
            raise ConfigError(f"there is no {what} {short_repr(value)}.", hint=did_you_mean(value, known))
    if form and (name not in ("records", FORMS[form].task) or source is not None):
        what = f"the task {name!r} has its own" if source is None else f"source is {short_repr(source)}"
        raise ConfigError(f"form is {form!r}, but {what}.", hint="leave one of the two out.")
    given = [template for template in (source, target) if template is not None]
    if given and TASKS[name].form is None:
        raise ConfigError(f"task {name!r} has columns of its own.", hint="leave out source and target.")
    if name == "records" and source is None and target is not None:
        raise ConfigError(f"target is {short_repr(target)}, but there is no source.", hint="give both, or none.")
    for template in given:
        check_template(template)
    return TASKS[name]


def _records(task: Task, path: Path | str, split: str | None) -> Generator[Record]:
    """The rows of a file, or of a folder's files; to be closed, as an error would leave a file open."""
    located = locate(Path(path), split, task.formats, task.release)
    for file in files_in(located, task.formats):
        yield from iter_file(file, task.formats)


def _each(make: Callable[[Record], Example | None]) -> Reader:
    return lambda records: [example for record in records if (example := make(record)) is not None]


# Li & Liang 2021. Table to text: beam 5, 5 to 100 new tokens; summaries: beam 6, 11 to 62; no line breaks.
_LINE: dict[str, Any] = {"ban_newlines": True}
_TABLE = {"num_beams": 5, "min_new_tokens": 5, "max_new_tokens": 100, "length_penalty": 1.0, **_LINE}
_SUMMARY = {"num_beams": 6, "min_new_tokens": 11, "max_new_tokens": 62, "length_penalty": 0.8, **_LINE}
_ROUGE, _ACCURACY, _SPANS = ("rouge_1", "rouge_2", "rouge_l"), ("accuracy", "macro_f1"), ("span_f1", "accuracy")
_SUMMARIES: dict[str, Any] = {"decoding": _SUMMARY, "metrics": _ROUGE, "protocol": "summarization"}
_TRIPLES: dict[str, Any] = {"decoding": _TABLE, "metrics": ("bleu", "meteor", "ter")}
# Labels and tags that are generated as text.
_LABEL, _TAG = ({"num_beams": 1, "max_new_tokens": length, **_LINE} for length in (16, 200))
_LABELS: dict[str, Any] = {"kind": "classification", "decoding": _LABEL, "metrics": _ACCURACY}
_TAGS: dict[str, Any] = {"kind": "tagging", "decoding": _TAG, "metrics": _SPANS}
_LISTS = (".jsonl", ".json", ".parquet")
_TABLES = "JSON lines, JSON, CSV, TSV or Parquet"
_TEST_XML = "testdata_with_lex.xml"
_DART = {part: (f"dart-*-full-{part}.json", f"dart-*-full-{part}.xml") for part in ("train", "dev", "test")}

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task(
            "e2e",
            "E2E NLG: restaurant descriptions; the release's CSV, or JSON lines",
            lambda records: merge_examples(map(e2e_example, records)),
            decoding=_TABLE,
            metrics=("bleu", "nist", "meteor", "rouge_l", "cider"),
            protocol="e2e",
            groups=("attributes",),
            formats=(".csv", ".jsonl"),
            release={"train": ("trainset.csv",), "dev": ("devset.csv",), "test": ("testset_w_refs.csv", "testset.csv")},
        ),
        Task(
            "webnlg",
            "WebNLG challenge 2017: texts about triples; the release's XML, or JSON lines",
            webnlg_examples,
            protocol="webnlg",
            groups=("category", "seen", "triples"),
            formats=(".xml", ".jsonl"),
            release={"train": ("train/",), "dev": ("dev/",), "test": (f"test/{_TEST_XML}", _TEST_XML)},
            **_TRIPLES,
        ),
        Task(
            "dart",
            "DART: texts about triples of many tables; the release's JSON and XML, or JSON lines",
            _each(dart_example),
            protocol="dart",
            groups=("triples", "source"),
            formats=(".xml", ".json", ".jsonl"),
            release=_DART,
            **_TRIPLES,
        ),
        Task("summarization", f"documents and summaries: {_TABLES}", form=FORMS["document"], **_SUMMARIES),
        Task("scitldr", "SciTLDR: abstracts", _each(scitldr_example), formats=(".jsonl", ".json"), **_SUMMARIES),
        Task("records", f"your own data, by columns or templates: {_TABLES}", form=TEMPLATES),
        Task("classification", f"a text and its label: {_TABLES}", form=FORMS["label"], **_LABELS),
        Task("tagging", "tokens and BIO tags: lists in JSON or Parquet", form=FORMS["tags"], formats=_LISTS, **_TAGS),
        Task("toy", "a small night-train board, made here to try things on", parts=("train", "held_out")),
    )
}


def default_decoding(task: object, headers: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The decoding settings of a task by default, as fields of `GenerateConfig`; empty if it is none.

    Args:
        task: Its name.
        headers: Of prefixes or trained weights: records get as many tokens as their longest target, if that is more.
    """
    values = dict(TASKS[task].decoding) if isinstance(task, str) and task in TASKS else {}
    if task == "records":
        # Texts have no targets.
        stored = [read_text_format(header) for header in headers if header.get("form") != "text"]
        longest = [form.longest_target for form in stored if form is not None]
        values["max_new_tokens"] = max([values["max_new_tokens"], *longest])
    return values
