"""The tasks by name: how each is read, and how its outputs are decoded and scored by default."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from prefixtune.data.examples import Example, TaskKind
from prefixtune.data.files import FORMATS, iter_file, join_lines
from prefixtune.data.folders import Release, locate
from prefixtune.data.forms import FORMS, Form, file_form, read_form
from prefixtune.data.tasks.classification import read_classification
from prefixtune.data.tasks.dart import DART_FORMATS, dart_entries, read_dart
from prefixtune.data.tasks.e2e import E2E_FORMATS, read_e2e
from prefixtune.data.tasks.records import read_records
from prefixtune.data.tasks.summarization import SCITLDR_FORMATS, read_scitldr, read_summaries
from prefixtune.data.tasks.tagging import TAGGING_FORMATS, read_tagging, untagged_example
from prefixtune.data.tasks.webnlg import WEBNLG_FORMATS, read_webnlg, webnlg_entries
from prefixtune.data.templates import render
from prefixtune.data.toy.classification import make_toy_labels
from prefixtune.data.toy.skills import SKILLS, make_skill
from prefixtune.data.toy.table_to_text import make_toy
from prefixtune.data.toy.tagging import make_toy_tags
from prefixtune.errors import ConfigError, DataError, did_you_mean

_PARTS = ("train", "held_out")
_SKILL_PARTS = ("train", "dev", "held_out")


@dataclass(frozen=True)
class Task:
    """One kind of data.

    Attributes:
        name: As in a configuration.
        description: One line for users.
        read: (path) -> examples; with columns (path, source template, target template) -> examples.
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
        takes_columns: Whether source and target may name columns (templates).
        read_all: If some entries of a file are not examples (they have no good text): path -> every entry, with None
            for those.
        merges: Rows of equal sources are one example.
    """

    name: str
    description: str
    read: Callable[..., list[Example]]
    decoding: dict[str, Any]
    kind: TaskKind = "generation"
    parts: tuple[str, ...] = ()
    metrics: tuple[str, ...] = ("bleu",)
    protocol: str = "plain"
    groups: tuple[str, ...] = ()
    formats: tuple[str, ...] = FORMATS
    release: Release = field(default_factory=dict)
    takes_columns: bool = False
    read_all: Callable[[Path], list[Example | None]] | None = None
    merges: bool = False


def read_task(
    task: str,
    path: Path | str,
    *,
    source: str | None = None,
    target: str | None = None,
    split: str | None = None,
    form: str = "",
    needs_targets: bool = False,
) -> list[Example]:
    """Read the examples of a task.

    >>> len(read_task("toy", "train")), len(read_task("toy", "held_out"))
    (320, 40)

    Args:
        task: A name of `TASKS`; `records` without `source`: the data's form is recognized (see `forms`).
        path: A file; `-` for standard input; a folder of files, or one that the `datasets` library saved; or
            `hub:NAME`. For the sets made here (`toy`, `toy_labels`, ...): `train` or `held_out`.
        source: Template of the source, for `records`, `classification` and `summarization`; for `tagging` the
            name of a column.
        target: Template of the target, likewise.
        split: `train`, `dev` or `test`: which part of a folder or set to read; ignored for a file and for a set made
            here.
        form: For `records` without `source`: the form that the data must have; empty: any that fits.
        needs_targets: Likewise: an example without a target is refused.

    Raises:
        ConfigError: The task, the form or the split is unknown; a template is missing, malformed, or given to a task
            that takes none; several forms fit; or the `datasets` library is needed and not installed.
        DataError: The file or one of its rows is wrong; or the folder has no such split, or several and none was
            named.
    """
    chosen = _chosen(task, source, form)
    # A part of a set made here is not a path, even if a folder has its name.
    file = Path(path) if chosen.parts else locate(Path(path), split, chosen.formats, chosen.release)
    if not chosen.takes_columns:
        if source is not None or target is not None:
            raise ConfigError(
                f"task {task!r} has its own format and takes no source or target template.",
                hint="leave them out, or use a task that reads your own columns, such as 'records'.",
            )
        return chosen.read(file)
    if not _has_form(task, source, target):
        return chosen.read(file, source, target)
    found, _ = file_form(file, form=form, needs_targets=needs_targets)
    return read_form(file, found, needs_targets=needs_targets)


def resolve_task(
    task: str,
    path: Path | str,
    *,
    source: str | None = None,
    target: str | None = None,
    split: str | None = None,
    form: str = "",
    needs_targets: bool = True,
) -> tuple[str, Form | None, tuple[str, ...]]:
    """The task that a file's form belongs to, the form, and its columns in the first row; the arguments of `read_task`.

    For a task that has no form, that is the task itself, None, and nothing.

    Raises:
        ConfigError: As for `read_task`.
        DataError: Likewise; only the first row is read.
    """
    chosen = _chosen(task, source, form)
    if not _has_form(task, source, target):
        return task, None, ()
    file = locate(Path(path), split, chosen.formats, chosen.release)
    found, row = file_form(file, form=form, needs_targets=needs_targets)
    return found.task, found, tuple(map(str, row))


def form_that_fits(
    task: str, path: Path | str, form: str, *, split: str | None = None, needs_targets: bool = True
) -> str:
    """A form's name, if the data has it; else empty, and the form is recognized."""
    try:
        resolve_task(task, path, split=split, form=form, needs_targets=needs_targets)
    except DataError:
        return ""
    return form


def _chosen(name: str, source: str | None, form: str) -> Task:
    """The task of that name; a form is refused that is unknown, or where there is none to choose."""
    for value, known in ((name, TASKS), (form, FORMS)):
        if value not in known and (value or known is TASKS):
            what = "form" if known is FORMS else "task"
            raise ConfigError(f"there is no {what} {value!r}.", hint=did_you_mean(value, known))
    if form and (name not in ("records", FORMS[form].task) or source is not None):
        what = f"the task {name!r} has its own" if source is None else f"source names the columns: {source!r}"
        raise ConfigError(f"form is {form!r}, but {what}.", hint="leave one of the two out.")
    return TASKS[name]


def _has_form(task: str, source: str | None, target: str | None) -> bool:
    """Whether the form of the data is recognized by their columns."""
    return task == "records" and source is None and target is None


def read_sources(task: str, path: Path, source: str) -> list[str]:
    """The sources of a file's rows, which need no targets.

    Args:
        task: A name of `TASKS` that takes columns.
        path: A file; `-` for standard input; or a set of the `datasets` library.
        source: As for `read_task`.

    Raises:
        ConfigError: The template is malformed.
        DataError: The file or one of its rows is wrong.
    """
    chosen = TASKS[task]
    if chosen.kind == "tagging":
        return [untagged_example(record, source).source for record in iter_file(path)]
    texts = [render(source, record.values, record.location) for record in iter_file(path)]
    return [join_lines(text) for text in texts] if chosen.protocol == "summarization" else texts


def read_all_entries(task: str, path: Path | str, *, split: str | None = None) -> list[Example | None]:
    """Every entry of a file, with None for those that `read_task` leaves out; empty if the task leaves none out.

    Args:
        task: A name of `TASKS`.
        path: As in `read_task`.
        split: As in `read_task`.
    """
    chosen = TASKS[task]
    if chosen.read_all is None:
        return []
    return chosen.read_all(locate(Path(path), split, chosen.formats, chosen.release))


def _toy_reader(
    name: str, make: Callable[[], Sequence[list[Example]]], parts: tuple[str, ...] = _PARTS
) -> Callable[[Path], list[Example]]:
    """The reader of a set that is made here."""

    def read(path: Path) -> list[Example]:
        if str(path) not in parts:
            raise ConfigError(
                f"task {name!r} is made here, not read: its path is one of {', '.join(parts)}; got {str(path)!r}.",
                hint=did_you_mean(str(path), parts),
            )
        return make()[parts.index(str(path))]

    return read


# For labels and tags that are generated as text: greedily, on one line.
_LABEL: dict[str, Any] = {"num_beams": 1, "max_new_tokens": 16, "ban_newlines": True}
_TAGS: dict[str, Any] = {"num_beams": 1, "max_new_tokens": 200, "ban_newlines": True}
_ANSWER: dict[str, Any] = {"num_beams": 1, "max_new_tokens": 32, "ban_newlines": True}
_TEXT: dict[str, Any] = {"num_beams": 1, "max_new_tokens": 100}
# Li & Liang 2021. Table to text: beam 5, 5 to 100 new tokens; summaries: beam 6, 11 to 62; no line breaks.
_TABLE: dict[str, Any] = {
    "num_beams": 5,
    "min_new_tokens": 5,
    "max_new_tokens": 100,
    "ban_newlines": True,
    "length_penalty": 1.0,
}
_SUMMARY: dict[str, Any] = {
    "num_beams": 6,
    "min_new_tokens": 11,
    "max_new_tokens": 62,
    "ban_newlines": True,
    "length_penalty": 0.8,
}
_LABEL_METRICS = ("accuracy", "macro_f1")
_TAG_METRICS = ("span_f1", "accuracy")
_SUMMARIES: dict[str, Any] = {
    "decoding": _SUMMARY,
    "metrics": ("rouge_1", "rouge_2", "rouge_l"),
    "protocol": "summarization",
}

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task(
            "e2e",
            "E2E NLG: restaurant descriptions; the release's CSV, or JSON lines",
            read_e2e,
            _TABLE,
            metrics=("bleu", "nist", "meteor", "rouge_l", "cider"),
            protocol="e2e",
            merges=True,
            groups=("attributes",),
            formats=E2E_FORMATS,
            release={
                "train": ("trainset.csv",),
                "dev": ("devset.csv",),
                "test": ("testset_w_refs.csv", "testset.csv"),
            },
        ),
        Task(
            "webnlg",
            "WebNLG challenge 2017: texts about triples; the release's XML, or JSON lines",
            read_webnlg,
            _TABLE,
            read_all=webnlg_entries,
            metrics=("bleu", "meteor", "ter"),
            protocol="webnlg",
            groups=("category", "seen", "triples"),
            formats=WEBNLG_FORMATS,
            release={
                "train": ("train/",),
                "dev": ("dev/",),
                "test": ("test/testdata_with_lex.xml", "testdata_with_lex.xml"),
            },
        ),
        Task(
            "dart",
            "DART: texts about triples of many tables; the release's JSON and XML, or JSON lines",
            read_dart,
            _TABLE,
            read_all=dart_entries,
            metrics=("bleu", "meteor", "ter"),
            protocol="dart",
            groups=("triples", "source"),
            formats=DART_FORMATS,
            release={
                split: (f"dart-*-full-{split}.json", f"dart-*-full-{split}.xml") for split in ("train", "dev", "test")
            },
        ),
        Task(
            "summarization",
            "documents and summaries: JSON lines, JSON, CSV, TSV or Parquet, columns document and summary (or article "
            "and highlights) unless named",
            read_summaries,
            takes_columns=True,
            **_SUMMARIES,
        ),
        Task(
            "scitldr",
            "SciTLDR: one-sentence summaries of abstracts; the release's JSON lines (SciTLDR-A)",
            read_scitldr,
            formats=SCITLDR_FORMATS,
            **_SUMMARIES,
        ),
        Task(
            "records",
            "your own data: JSON lines, JSON, CSV, TSV or Parquet, whose columns say what they are (chats, prompts, "
            "instructions, texts, ...) or are named by templates",
            read_records,
            _TEXT,
            merges=True,
            takes_columns=True,
        ),
        Task(
            "toy",
            "a small night-train board, made here to try things on",
            _toy_reader("toy", make_toy),
            _TEXT,
            parts=_PARTS,
        ),
        Task(
            "classification",
            "a text and its label: JSON lines, JSON, CSV, TSV or Parquet, columns text and label unless named",
            read_classification,
            _LABEL,
            "classification",
            metrics=_LABEL_METRICS,
            takes_columns=True,
        ),
        Task(
            "toy_labels",
            "messages to a night-train office and their departments, made here",
            _toy_reader("toy_labels", make_toy_labels),
            _LABEL,
            "classification",
            parts=_PARTS,
            metrics=_LABEL_METRICS,
        ),
        Task(
            "tagging",
            "tokens and their BIO tags: JSON lines, JSON, Parquet, or CoNLL files of one token a line",
            read_tagging,
            _TAGS,
            "tagging",
            metrics=_TAG_METRICS,
            formats=TAGGING_FORMATS,
            takes_columns=True,
        ),
        Task(
            "toy_tags",
            "messages to a night-train office with trains, stations, times and coaches, made here",
            _toy_reader("toy_tags", make_toy_tags),
            _TAGS,
            "tagging",
            parts=_PARTS,
            metrics=_TAG_METRICS,
        ),
        *(
            Task(
                f"toy_{name}",
                f"short questions with one exact answer ({name}), made here to see what a prefix can learn",
                _toy_reader(f"toy_{name}", partial(make_skill, name), _SKILL_PARTS),
                _ANSWER,
                parts=_SKILL_PARTS,
                metrics=("exact_match",),
            )
            for name in SKILLS
        ),
    )
}
