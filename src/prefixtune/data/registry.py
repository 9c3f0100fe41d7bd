"""The tasks by name: how each is read, and how its outputs are decoded and scored by default."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from prefixtune.data.examples import Example, TaskKind
from prefixtune.data.files import FORMATS, iter_file, join_lines
from prefixtune.data.folders import Release, locate
from prefixtune.data.forms import FORMS, Form, file_form, iter_form, read_form
from prefixtune.data.tasks.classification import iter_classification, read_classification
from prefixtune.data.tasks.dart import DART_FORMATS, dart_entries, read_dart
from prefixtune.data.tasks.e2e import E2E_FORMATS, read_e2e
from prefixtune.data.tasks.records import iter_records, read_records
from prefixtune.data.tasks.summarization import (
    SCITLDR_FORMATS,
    iter_summaries,
    iter_xsum,
    read_scitldr,
    read_summaries,
    read_xsum,
)
from prefixtune.data.tasks.tagging import TAGGING_FORMATS, read_tagging, untagged_example
from prefixtune.data.tasks.webnlg import WEBNLG_FORMATS, read_webnlg, webnlg_entries
from prefixtune.data.templates import render
from prefixtune.data.toy.classification import make_toy_labels
from prefixtune.data.toy.skills import SKILLS, make_skill
from prefixtune.data.toy.table_to_text import make_toy
from prefixtune.data.toy.tagging import make_toy_tags
from prefixtune.errors import ConfigError, did_you_mean

__all__ = ["TASKS", "Task", "load_task", "read_all_entries", "read_sources", "read_task", "resolve_task"]


_PARTS = ("train", "held_out")
_SKILL_PARTS = ("train", "dev", "held_out")


@dataclass(frozen=True)
class Task:
    """One kind of data.

    Attributes:
        name: As in a configuration.
        description: One line for users.
        read: (path, source template, target template) -> examples.
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
        max_source_length: Tokens of a source that the paper's models read; 0: all. For users and presets.
        read_all: If some entries of a file are not examples (they have no good text): path -> every entry, with None
            for those.
        iterate: As `read`, one example for each row, where that can be done without all of the file in memory.
        merges: Rows of equal sources are one example, but of `iterate`, which gives one for each row.
    """

    name: str
    description: str
    read: Callable[[Path, str | None, str | None], list[Example]]
    decoding: dict[str, Any]
    kind: TaskKind = "generation"
    parts: tuple[str, ...] = ()
    metrics: tuple[str, ...] = ("bleu",)
    protocol: str = "plain"
    groups: tuple[str, ...] = ()
    formats: tuple[str, ...] = FORMATS
    release: Release = field(default_factory=dict)
    takes_columns: bool = False
    max_source_length: int = 0
    read_all: Callable[[Path], list[Example | None]] | None = None
    iterate: Callable[[Path, str | None, str | None], Iterator[Example]] | None = None
    merges: bool = False

    @property
    def targets_hint(self) -> str:
        """What to do about data without targets."""
        if self.takes_columns:
            return "name the target column (--target), or a file with references."
        names = [name for name in self.release.get("test", ()) if "*" not in name]
        example = f", such as {names[0]}" if names else ""
        return f"name the file with references{example}."


def read_task(
    task: str,
    path: Path | str,
    *,
    source: str | None = None,
    target: str | None = None,
    split: str | None = None,
    form: str = "",
    prefer: str = "",
    needs_targets: bool = False,
) -> list[Example]:
    """Read the examples of a task.

    >>> len(read_task("toy", "train")), len(read_task("toy", "held_out"))
    (320, 40)

    Args:
        task: A name of `TASKS`; `records` without `source`: the data's form is recognized (see `forms`).
        path: A file; `-` for standard input; a folder of files, or one that the `datasets` library saved; or
            `hub:NAME`. For the sets made here (`toy`, `toy_labels`, ...): `train` or `held_out`.
        source: Template of the source, for `records`, `classification`, `summarization` and `xsum`; for `tagging` the
            name of a column.
        target: Template of the target, likewise.
        split: `train`, `dev` or `test`: which part of a folder or set to read; ignored for a file and for a set made
            here.
        form: For `records` without `source`: the form that the data must have; empty: any that fits.
        prefer: Likewise: the form that is taken where several fit.
        needs_targets: Likewise: an example without a target is refused.

    Raises:
        ConfigError: The task, the form or the split is unknown; a template is missing, malformed, or given to a task
            that takes none; several forms fit; or the `datasets` library is needed and not installed.
        DataError: The file or one of its rows is wrong; or the folder has no such split, or several and none was
            named.
    """
    chosen = _task(task)
    _check_form(task, source, form)
    # A part of a set made here is not a path, even if a folder has its name.
    file = Path(path) if chosen.parts else locate(Path(path), split, chosen.formats, chosen.release)
    if not _has_form(task, source, target):
        return chosen.read(file, source, target)
    found, _ = file_form(file, form=form, prefer=prefer, needs_targets=needs_targets)
    return read_form(file, found, needs_targets=needs_targets)


def resolve_task(
    task: str,
    path: Path | str,
    *,
    source: str | None = None,
    target: str | None = None,
    split: str | None = None,
    form: str = "",
    prefer: str = "",
    needs_targets: bool = True,
) -> tuple[str, Form | None, tuple[str, ...]]:
    """The task that a file's form belongs to, the form, and its columns in the first row; the arguments of `read_task`.

    For a task that has no form, that is the task itself, None, and nothing.

    Raises:
        ConfigError: As for `read_task`.
        DataError: Likewise; only the first row is read.
    """
    chosen = _task(task)
    _check_form(task, source, form)
    if not _has_form(task, source, target):
        return task, None, ()
    file = locate(Path(path), split, chosen.formats, chosen.release)
    found, row = file_form(file, form=form, prefer=prefer, needs_targets=needs_targets)
    return found.task, found, found.columns_of(row)


def _task(name: str) -> Task:
    if name not in TASKS:
        raise ConfigError(f"there is no task {name!r}.", hint=did_you_mean(name, TASKS))
    return TASKS[name]


def _has_form(task: str, source: str | None, target: str | None) -> bool:
    """Whether the form of the data is recognized by their columns."""
    return task == "records" and source is None and target is None


def _check_form(task: str, source: str | None, form: str) -> None:
    """Refuse a form where there is none to choose, and one that is unknown."""
    if not form:
        return
    if form not in FORMS:
        raise ConfigError(f"there is no form {form!r}.", hint=did_you_mean(form, FORMS))
    if task not in ("records", FORMS[form].task):
        raise ConfigError(f"form is {form!r}, but the task {task!r} has its own.", hint="leave one of the two out.")
    if source is not None:
        raise ConfigError(
            f"form is {form!r}, but source names the columns: {source!r}.", hint="leave one of the two out."
        )


def load_task(
    task: str,
    path: Path | str,
    *,
    source: str | None = None,
    target: str | None = None,
    split: str | None = None,
    form: str = "",
    prefer: str = "",
    needs_targets: bool = False,
    keep: bool = True,
) -> Sequence[Example]:
    """As `read_task`, but many examples stay in a file: see `stored_examples`.

    Args:
        task: As for `read_task`, like the others.
        path: Likewise.
        source: Likewise.
        target: Likewise.
        split: Likewise.
        form: Likewise.
        prefer: Likewise.
        needs_targets: Likewise.
        keep: Whether the examples of a large file may stay in the user's cache.

    Raises:
        PrefixError: As for `read_task`; or the disk is full.
    """
    # Imported here: numpy takes a moment.
    from prefixtune.data.stored_examples import gather, gather_file

    chosen = _task(task)
    iterate, has_form = chosen.iterate, _has_form(task, source, target)
    if not has_form and (iterate is None or (task == "records" and source is None)):
        return gather(read_task(task, path, source=source, target=target, split=split, form=form))
    _check_form(task, source, form)
    file = locate(Path(path), split, chosen.formats, chosen.release)
    if not has_form and iterate is not None:
        facts = {"task": task, "source": source, "target": target}
        return gather_file(file, lambda: iterate(file, source, target), merge=chosen.merges, keep=keep, **facts)
    found, _ = file_form(file, form=form, prefer=prefer, needs_targets=needs_targets)
    return gather_file(
        file,
        lambda: iter_form(iter_file(file), found, needs_targets=needs_targets),
        merge=found.merges,
        keep=keep,
        form=found.name,
        needs_targets=needs_targets,
    )


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
    chosen = _task(task)
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


def _no_templates(task: str, source: str | None, target: str | None) -> None:
    for name, value in (("source", source), ("target", target)):
        if value is not None:
            raise ConfigError(
                f"task {task!r} has its own format and takes no {name} template; got {value!r}.",
                hint=f"leave {name} out, or use a task that reads your own columns, such as 'records'.",
            )


def _own_format(
    task: str, read_file: Callable[[Path], list[Example]]
) -> Callable[[Path, str | None, str | None], list[Example]]:
    """The reader of a set that has its own format and therefore takes no templates."""

    def read(path: Path, source: str | None, target: str | None) -> list[Example]:
        _no_templates(task, source, target)
        return read_file(path)

    return read


def _read_records(path: Path, source: str | None, target: str | None) -> list[Example]:
    if source is None:
        raise ConfigError(
            f"target is {target!r}, but there is no source.",
            hint="give source too, a column's name or text with {column} in it; or leave target out, and the form is "
            "recognized.",
        )
    return read_records(path, source, target)


def _iter_records(path: Path, source: str | None, target: str | None) -> Iterator[Example]:
    return iter_records(path, source or "", target)


def _toy_reader(
    name: str, make: Callable[[], Sequence[list[Example]]], parts: tuple[str, ...] = _PARTS
) -> Callable[[Path, str | None, str | None], list[Example]]:
    """The reader of a set that is made here."""

    def read(path: Path, source: str | None, target: str | None) -> list[Example]:
        _no_templates(name, source, target)
        part = str(path)
        if part not in parts:
            raise ConfigError(
                f"task {name!r} is made here, not read: its path is one of {', '.join(parts)}; got {part!r}.",
                hint=did_you_mean(part, parts),
            )
        return make()[parts.index(part)]

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
    "max_source_length": 512,
}

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task(
            "e2e",
            "E2E NLG: restaurant descriptions; the release's CSV, or JSON lines",
            _own_format("e2e", read_e2e),
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
            _own_format("webnlg", read_webnlg),
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
            _own_format("dart", read_dart),
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
            iterate=iter_summaries,
            takes_columns=True,
            **_SUMMARIES,
        ),
        Task(
            "xsum",
            "XSUM: one-sentence summaries of news; columns document and summary unless named",
            read_xsum,
            iterate=iter_xsum,
            takes_columns=True,
            **_SUMMARIES,
        ),
        Task(
            "scitldr",
            "SciTLDR: one-sentence summaries of abstracts; the release's JSON lines (SciTLDR-A)",
            _own_format("scitldr", read_scitldr),
            formats=SCITLDR_FORMATS,
            **_SUMMARIES,
        ),
        Task(
            "records",
            "your own data: JSON lines, JSON, CSV, TSV or Parquet, whose columns say what they are (chats, prompts, "
            "instructions, texts, ...) or are named by templates",
            _read_records,
            _TEXT,
            iterate=_iter_records,
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
            iterate=iter_classification,
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
