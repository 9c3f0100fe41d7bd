"""Forms of data that people have, recognized by their columns: chats, prompts and completions, instructions, texts, ...

A file has one form: that of its first row, which every later row must have too. Other columns are kept in the
examples' `fields`. Where two forms fit, one must be named.

Examples of one turn with equal sources are merged, with all their targets in order: targets of one source share its
computation. A conversation of several turns, and a text, is an example of its own.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from prefixtune.data.examples import Example, Message, merge_examples
from prefixtune.data.files import Record, iter_file
from prefixtune.data.messages import parse_messages, split_answer, unused_keys
from prefixtune.data.streams import shown
from prefixtune.data.tasks.classification import labelled_example
from prefixtune.data.tasks.summarization import DOCUMENT_COLUMNS, SUMMARY_COLUMNS, summary_example
from prefixtune.data.tasks.tagging import tagged_example, untagged_example
from prefixtune.data.templates import render, targets_of
from prefixtune.errors import ConfigError, DataError, did_you_mean

__all__ = [
    "FORMS",
    "Form",
    "describe_counts",
    "describe_data",
    "detect_form",
    "file_form",
    "fitting_forms",
    "iter_form",
    "make_example",
    "read_form",
]

_CHATS = ("messages", "conversations", "prompt")
"""The forms whose columns may hold messages."""
_COMPLETIONS = ("completion", "response")
_OUTPUTS = ("output", "response")
_ANSWERS = ("answer", "answers")
_MAX_SHOWN = 12
"""Columns that a message lists at most."""
_REFUSED = {
    ("chosen", "rejected"): "pairs of a chosen and a rejected answer are not learned here; "
    "for the chosen ones: --source prompt --target chosen.",
    ("input_ids",): "token ids are not read: give the texts.",
}
"""Columns of data that is not read -> why, and what to do."""


@dataclass(frozen=True)
class Form:
    """A form of data.

    Attributes:
        name: What `--form` calls it.
        columns: Its columns; of each group one must be there, and the first that is there is used. The last group
            holds the targets, but for forms of one group.
        title: What people call it, in the plural.
        units: What its examples and its targets are called, in the singular.
        make: A row -> its example; the last argument says whether a target is needed.
        optional: Columns that are used too, if they are there.
        task: Of the data.
    """

    name: str
    columns: tuple[tuple[str, ...], ...]
    title: str
    units: tuple[str, str]
    make: Callable[[Record, bool], Example]
    optional: tuple[str, ...] = ()
    task: str = "records"

    @property
    def signature(self) -> str:
        """Its columns, as messages show them."""
        return " + ".join(group[0] for group in self.columns)

    @property
    def merges(self) -> bool:
        """Whether rows of equal sources are one example."""
        # Each row of a named task counts, as in the published figures of test sets.
        return self.task == "records"

    def fits(self, columns: Iterable[str], *, needs_targets: bool = True) -> bool:
        """Whether rows with these columns have this form.

        Args:
            columns: Of a row.
            needs_targets: The column of the targets must be there.
        """
        present = set(columns)
        groups = self.columns if needs_targets or len(self.columns) == 1 else self.columns[:-1]
        return all(present & set(group) for group in groups)

    def columns_of(self, row: Mapping[str, Any]) -> tuple[str, ...]:
        """The names of a row's columns, and, as in `messages.name`, those within messages that are not read."""
        names = tuple(map(str, row))
        read = [name for group in self.columns for name in group if name in row and self.name in _CHATS]
        return (*names, *(f"{name}.{key}" for name in read for key in unused_keys(_messages_in(row[name]))))

    def unused(self, columns: Iterable[str]) -> list[str]:
        """Columns that are kept in the examples' fields alone."""
        present = list(columns)
        used = {next((name for name in group if name in present), "") for group in self.columns}
        return [column for column in present if column not in used and column not in self.optional]


# --- which form ------------------------------------------------------------------------------------------------------


def detect_form(
    row: Mapping[str, Any], location: str, *, form: str = "", prefer: str = "", needs_targets: bool = True
) -> Form:
    """The form of a row, by its columns.

    >>> detect_form({"prompt": "1+1", "completion": "2"}, "a.csv, line 2").title
    'prompts and completions'

    Args:
        row: Column -> value; the first of its file.
        location: Its location, for messages.
        form: The name of the form that it must have; empty: any.
        prefer: The name of a form that is taken wherever it fits.
        needs_targets: Rows without a column of targets are refused.

    Raises:
        ConfigError: There is no form of that name, or several fit.
        DataError: None fits, or not the one that was named.
    """
    if form and form not in FORMS:
        raise ConfigError(f"there is no form {form!r}.", hint=did_you_mean(form, FORMS))
    if form:
        if not FORMS[form].fits(row, needs_targets=needs_targets):
            raise DataError(
                f"{location} has the columns {_listed(row)}, but the form {form!r} needs {FORMS[form].signature}.",
                hint="leave the form out, or rename the columns.",
            )
        return FORMS[form]
    fitting = _candidates(row, needs_targets)
    if prefer and (chosen := [one for one in fitting if one.name == prefer]):
        return chosen[0]
    fitting = _likeliest(fitting, row)
    if len(fitting) > 1:
        readings = ", or as ".join(f"{one.title} ({one.signature})" for one in fitting)
        raise ConfigError(
            f"{location} can be read as {readings}.",
            hint=f"choose one: {' or '.join(f'--form {one.name}' for one in fitting)}.",
        )
    if not fitting:
        raise _unknown_form(row, location)
    return fitting[0]


def fitting_forms(row: Mapping[str, Any]) -> list[Form]:
    """The forms with targets that a row may have, by its columns; where there are several, one must be chosen.

    Args:
        row: Column -> value; the first of its file.
    """
    return _likeliest(_candidates(row, needs_targets=True), row)


def _candidates(row: Mapping[str, Any], needs_targets: bool) -> list[Form]:
    fitting = [one for one in FORMS.values() if one.fits(row)]
    is_refused = any(all(name in row for name in names) for names in _REFUSED)
    if not fitting and not needs_targets and not is_refused:
        fitting = [one for one in FORMS.values() if one.fits(row, needs_targets=False)]
    return fitting


def _likeliest(fitting: list[Form], row: Mapping[str, Any]) -> list[Form]:
    if len(fitting) < 2:
        return fitting
    # A text is a whole example only where nothing else is one; exports of several files fill columns with null.
    fitting = [one for one in fitting if one.name != "text"]
    filled = [one for one in fitting if one.fits(name for name, value in row.items() if value is not None)]
    return filled or fitting


def _unknown_form(row: Mapping[str, Any], location: str) -> DataError:
    known = "; ".join(one.signature for one in FORMS.values())
    message = f"{location} has the columns {_listed(row)}; forms that are recognized: {known}."
    for columns, hint in _REFUSED.items():
        if all(column in row for column in columns):
            return DataError(message, hint=hint)
    named = "name the columns, as in --source '{name} is {food}' --target text."
    names = {name for one in FORMS.values() for group in one.columns for name in group}
    for column in list(map(str, row))[:_MAX_SHOWN]:
        guess = did_you_mean(column.lower(), names)
        if guess.startswith("did you mean") and column not in names:
            meant = f"{guess.removesuffix('?')} by the column {column[:40]!r}? Rename it, or"
            return DataError(message, hint=f"{meant} {named}")
    return DataError(message, hint=named)


def _listed(row: Mapping[str, Any]) -> str:
    names = [str(name)[:40] for name in row]
    more = f", ... ({len(names)} in all)" if len(names) > _MAX_SHOWN else ""
    return (", ".join(names[:_MAX_SHOWN]) or "none") + more


def file_form(
    path: Path, *, form: str = "", prefer: str = "", needs_targets: bool = True
) -> tuple[Form, Mapping[str, Any]]:
    """The form of a file, and its first row.

    Args:
        path: A file, `-` for standard input, or a set of the `datasets` library.
        form: As for `detect_form`, like the others.
        prefer: Likewise.
        needs_targets: Likewise.

    Raises:
        ConfigError: As for `detect_form` and `iter_file`.
        DataError: Likewise.
    """
    first = next(iter_file(path))
    chosen = detect_form(first.values, first.location, form=form, prefer=prefer, needs_targets=needs_targets)
    return chosen, first.values


# --- reading ---------------------------------------------------------------------------------------------------------


def read_form(path: Path, form: Form, *, needs_targets: bool = False) -> list[Example]:
    """The examples of a file, merged as the module says.

    Args:
        path: As for `file_form`.
        form: Of the file.
        needs_targets: A row without a target is refused.

    Raises:
        DataError: A row is wrong, or has another form; the message names file and row.
    """
    examples = iter_form(iter_file(path), form, needs_targets=needs_targets)
    return merge_examples(examples) if form.merges else list(examples)


def iter_form(records: Iterable[Record], form: Form, *, needs_targets: bool = False) -> Iterator[Example]:
    """The example of each row, one at a time and not merged; the arguments are those of `read_form`."""
    for record in records:
        yield make_example(record, form, needs_targets=needs_targets)


def make_example(record: Record, form: Form, *, needs_targets: bool = False) -> Example:
    """The example of one row; the arguments are those of `read_form`."""
    if not form.fits(record.values, needs_targets=needs_targets):
        raise _other_form(record, form)
    return form.make(record, needs_targets)


def _other_form(record: Record, form: Form) -> DataError:
    """The error of a row that lacks the form's columns."""
    others = [one for one in FORMS.values() if one.fits(record.values)]
    if others:
        return DataError(
            f"{record.location} has the form of {others[0].title} ({others[0].signature}), but the rows before it that "
            f"of {form.title} ({form.signature}).",
            hint="put each form into a file of its own.",
        )
    missing = next((group for group in form.columns if not set(group) & record.values.keys()), form.columns[-1])
    return DataError(
        f"{record.location}: there is no column {' or '.join(map(repr, missing))}; there are: "
        f"{_listed(record.values)}.",
        hint=f"rows of {form.title} need {form.signature}.",
    )


def describe_data(form: Form, examples: Sequence[Example], path: Path | str, columns: Iterable[str] = ()) -> str:
    """One line for people: what was read, and which columns are not used.

    >>> describe_data(FORMS["question"], [Example("Why?", ("So.", "Because."))], "a.csv", ["question", "answer", "id"])
    'a.csv: read as questions and answers: 1 question, 2 answers; not used: id'

    Args:
        form: Of the data.
        examples: All of them.
        path: Where they are from.
        columns: The first row, or the names that `Form.columns_of` gives of it.
    """
    # Imported here: numpy takes a moment.
    from prefixtune.data.stored_examples import count_answers

    if isinstance(columns, Mapping):
        columns = form.columns_of(columns)
    return describe_counts(form, len(examples), count_answers(examples), path, columns)


def describe_counts(
    form: Form, num_examples: int, num_answers: int, path: Path | str, columns: Iterable[str] = ()
) -> str:
    """As `describe_data`, of so many examples with so many targets and earlier answers."""
    counts = [_count(num_examples, form.units[0])]
    if form.units[1]:
        counts.append(_count(num_answers, form.units[1]))
    unused = [str(column)[:40] for column in form.unused(columns)]
    more = "..." if len(unused) > _MAX_SHOWN else ""
    note = f"; not used: {', '.join(unused[:_MAX_SHOWN])}{more}" if unused else ""
    return f"{shown(path)}: read as {form.title}: {', '.join(counts)}{note}"


def _count(number: int, unit: str) -> str:
    plural = unit if number == 1 else f"{unit.removesuffix('y')}ies" if unit.endswith("ry") else f"{unit}s"
    return f"{number:,} {plural}"


# --- rows -> examples ------------------------------------------------------------------------------------------------


def _present(record: Record, names: Sequence[str]) -> str:
    """The first of these columns that a row has filled; else the first that it has; else the last one."""
    present = [name for name in names if name in record.values]
    return next((name for name in present if _is_filled(record.values[name])), [*present, names[-1]][0])


def _is_filled(value: Any) -> bool:
    """Whether a cell holds something; white space is nothing."""
    return bool(value.strip()) if isinstance(value, str) else value is not None and value != []


def _targets(record: Record, names: Sequence[str], needed: bool) -> tuple[str, ...]:
    column = _present(record, names)
    if not needed and not _is_filled(record.values.get(column)):
        return ()
    return tuple(targets_of(column, record))


def _conversation(column: str, record: Record, needs_targets: bool) -> Example:
    _refuse_tools(record)
    messages = parse_messages(record.values[column], column, record.location)
    return _chat(messages, record, needs_targets)


def _chat(messages: list[Message], record: Record, needs_targets: bool) -> Example:
    before, answers = split_answer(messages, record.location, needs_answer=needs_targets)
    return Example(before[-1].content, answers, record.values, messages=before)


def _refuse_tools(record: Record) -> None:
    for column in ("tools", "functions"):
        if record.values.get(column) not in (None, [], "", "[]"):
            raise DataError(
                f"{record.location}: {column!r} is not empty; calls of tools are not learned here.",
                hint="leave such conversations out, or drop the column.",
            )


def _prompt(record: Record, needs_targets: bool) -> Example:
    column = _present(record, _COMPLETIONS)
    prompt, answer = (_messages_in(record.values.get(name)) for name in ("prompt", column))
    if not isinstance(prompt, list) and not (isinstance(answer, list) and answer and isinstance(answer[0], Mapping)):
        return _one_turn(record, render("prompt", record.values, record.location), _COMPLETIONS, needs_targets)
    _refuse_tools(record)
    messages = [*_system(record), *_messages_or_text(prompt, "prompt", "user", record)]
    if answer is not None:
        messages += _messages_or_text(answer, column, "assistant", record)
    return _chat(messages, record, needs_targets)


def _messages_in(value: Any) -> Any:
    """The messages that a text holds as JSON, as a cell of a table does; any other value as it is."""
    # Most texts are none, and need not be parsed.
    if not isinstance(value, str) or not value.lstrip().startswith("[") or not value.rstrip().endswith("}]"):
        return value
    try:
        items = json.loads(value)
    except (ValueError, RecursionError):
        return value
    are_messages = all(
        isinstance(item, dict) and ({"role", "content"} <= item.keys() or {"from", "value"} <= item.keys())
        for item in items
    )
    return items if are_messages else value


def _messages_or_text(value: Any, column: str, role: Literal["user", "assistant"], record: Record) -> list[Message]:
    if isinstance(value, list):
        return parse_messages(value, column, record.location)
    return [Message(role, render(column, record.values, record.location))]


def _system(record: Record) -> list[Message]:
    """The message of the column `system`; none, where it is empty."""
    if not _is_filled(record.values.get("system")):
        return []
    return [Message("system", render("system", record.values, record.location))]


def _instruction(record: Record, needs_targets: bool) -> Example:
    source = _with_text(record, "instruction", ("input", "context"))
    return _one_turn(record, source, ("output", "response"), needs_targets)


def _question(record: Record, needs_targets: bool) -> Example:
    source = _with_text(record, "question", ("context",))
    values = {name: _answer(record.values[name]) for name in _ANSWERS if name in record.values}
    return Example(source, _targets(Record(record.location, values), _ANSWERS, needs_targets), record.values)


def _answer(value: Any) -> Any:
    """The texts of answers that also say where they begin, as SQuAD's do; any other value as it is.

    >>> _answer({"text": ["Rome"], "answer_start": [7]}), _answer([{"text": "Rome", "answer_start": 7}])
    (['Rome'], ['Rome'])
    """
    if isinstance(value, list):
        return [_answer(item) for item in value]
    return value["text"] if isinstance(value, Mapping) and "text" in value else value


def _with_text(record: Record, column: str, texts: Sequence[str]) -> str:
    """What is asked, and after an empty line the text that it is about, if one of these columns is filled."""
    source = render(column, record.values, record.location)
    about = _present(record, texts)
    if _is_filled(record.values.get(about)):
        source = f"{source}\n\n{render(about, record.values, record.location)}"
    return source


def _one_turn(record: Record, source: str, columns: Sequence[str], needs_targets: bool) -> Example:
    """One question of the user and its answers, perhaps with a system message."""
    targets = _targets(record, columns, needs_targets)
    return Example(source, targets, record.values, messages=(*_system(record), Message("user", source)))


def _plain(source: str, *targets: str) -> Callable[[Record, bool], Example]:
    """The reader of a column of sources and one of targets."""

    def make(record: Record, needs_targets: bool) -> Example:
        text = render(source, record.values, record.location)
        return Example(text, _targets(record, targets, needs_targets), record.values)

    return make


def _text(record: Record, needs_targets: bool) -> Example:
    """A text to learn as it is, with nothing before it."""
    text = record.values["text"]
    if not isinstance(text, str) or not text.strip():
        # It says what is wrong with it.
        text = render("text", record.values, record.location)
    return Example("", (text,), record.values)


def _label(record: Record, needs_targets: bool) -> Example:
    if not needs_targets and not _is_filled(record.values.get("label")):
        return Example(render("text", record.values, record.location), (), record.values)
    return labelled_example(record, "text", "label")


def _tags(record: Record, needs_targets: bool) -> Example:
    if not needs_targets and record.values.get("tags") is None:
        return untagged_example(record, "tokens")
    return tagged_example(record, "tokens", "tags")


FORMS: dict[str, Form] = {
    form.name: form
    for form in (
        Form("messages", (("messages",),), "chats", ("conversation", "answer"), partial(_conversation, "messages")),
        Form(
            "conversations",
            (("conversations",),),
            "chats",
            ("conversation", "answer"),
            partial(_conversation, "conversations"),
        ),
        Form(
            "prompt",
            (("prompt",), _COMPLETIONS),
            "prompts and completions",
            ("prompt", "completion"),
            _prompt,
            optional=("system",),
        ),
        Form(
            "instruction",
            (("instruction",), _OUTPUTS),
            "instructions",
            ("instruction", "answer"),
            _instruction,
            optional=("input", "context", "system"),
        ),
        Form(
            "question",
            (("question",), _ANSWERS),
            "questions and answers",
            ("question", "answer"),
            _question,
            optional=("context",),
        ),
        Form(
            "source",
            (("source",), ("target", "targets")),
            "sources and targets",
            ("source", "target"),
            _plain("source", "target", "targets"),
        ),
        Form(
            "document",
            (DOCUMENT_COLUMNS, SUMMARY_COLUMNS),
            "documents and summaries",
            ("document", "summary"),
            lambda record, needs_targets: summary_example(record, needs_target=needs_targets),
            task="summarization",
        ),
        Form("label", (("text",), ("label",)), "texts and labels", ("text", ""), _label, task="classification"),
        Form("tags", (("tokens",), ("tags",)), "tokens and tags", ("sentence", ""), _tags, task="tagging"),
        Form("text", (("text",),), "texts", ("text", ""), _text),
    )
}
"""Name -> form, in the order in which messages list them."""
