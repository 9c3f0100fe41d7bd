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
from prefixtune.data.messages import parse_messages, split_answer
from prefixtune.data.streams import shown
from prefixtune.data.tasks.classification import labelled_example
from prefixtune.data.tasks.summarization import DOCUMENT_COLUMNS, SUMMARY_COLUMNS, summary_example
from prefixtune.data.tasks.tagging import tagged_example, untagged_example
from prefixtune.data.templates import render, targets_of
from prefixtune.errors import ConfigError, DataError, did_you_mean

_COMPLETIONS = ("completion", "response")
_OUTPUTS = ("output", "response")
_ANSWERS = ("answer", "answers")
_MAX_SHOWN = 12
"""Columns that a message lists at most."""


@dataclass(frozen=True)
class Form:
    """A form of data.

    Attributes:
        name: What `--form` calls it.
        columns: Its columns; of each group one must be there, and the first that is there is used. The last group
            holds the targets, but for forms of one group.
        title: What people call it, in the plural.
        make: A row -> its example; the last argument says whether a target is needed.
        optional: Columns that are used too, if they are there.
        task: Of the data.
    """

    name: str
    columns: tuple[tuple[str, ...], ...]
    title: str
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

    def unused(self, columns: Iterable[str]) -> list[str]:
        """Columns that are kept in the examples' fields alone."""
        present = list(columns)
        used = {next((name for name in group if name in present), "") for group in self.columns}
        return [column for column in present if column not in used and column not in self.optional]


# --- which form ------------------------------------------------------------------------------------------------------


def detect_form(row: Mapping[str, Any], location: str, *, form: str = "", needs_targets: bool = True) -> Form:
    """The form of a row, by its columns.

    >>> detect_form({"prompt": "1+1", "completion": "2"}, "a.csv, line 2").title
    'prompts and completions'

    Args:
        row: Column -> value; the first of its file.
        location: Its location, for messages.
        form: The name of the form that it must have; empty: any.
        needs_targets: Rows without a column of targets are refused.

    Raises:
        ConfigError: There is no form of that name, or several fit.
        DataError: None fits, or not the one that was named.
    """
    if form and form not in FORMS:
        raise ConfigError(f"there is no form {form!r}.", hint=did_you_mean(form, FORMS))
    fitting = [one for one in FORMS.values() if one.name == form and one.fits(row, needs_targets=needs_targets)]
    if not form:
        fitting = fitting_forms(row)
    if not form and not fitting and not needs_targets:
        fitting = [one for one in FORMS.values() if one.fits(row, needs_targets=False)]
    if len(fitting) > 1:
        readings = ", or as ".join(f"{one.title} ({one.signature})" for one in fitting)
        raise ConfigError(
            f"{location} can be read as {readings}.",
            hint=f"choose one: {' or '.join(f'--form {one.name}' for one in fitting)}.",
        )
    if not fitting:
        known = FORMS[form].signature if form else "; ".join(one.signature for one in FORMS.values())
        raise DataError(
            f"{location} has the columns {_listed(row)}; forms that are recognized: {known}.",
            hint="rename the columns, or name them, as in --source '{name} is {food}' --target text.",
        )
    return fitting[0]


def fitting_forms(row: Mapping[str, Any]) -> list[Form]:
    """The forms with targets that a row may have, by its columns; where there are several, one must be chosen.

    Args:
        row: Column -> value; the first of its file.
    """
    fitting = [one for one in FORMS.values() if one.fits(row)]
    # A text is a whole example only where nothing else is one.
    return [one for one in fitting if one.name != "text"] or fitting


def _listed(row: Mapping[str, Any]) -> str:
    names = [str(name)[:40] for name in row]
    more = f", ... ({len(names)} in all)" if len(names) > _MAX_SHOWN else ""
    return (", ".join(names[:_MAX_SHOWN]) or "none") + more


def file_form(path: Path, *, form: str = "", needs_targets: bool = True) -> tuple[Form, Mapping[str, Any]]:
    """The form of a file, and its first row.

    Args:
        path: A file, `-` for standard input, or a set of the `datasets` library.
        form: As for `detect_form`, like the other.
        needs_targets: Likewise.

    Raises:
        ConfigError: As for `detect_form` and `iter_file`.
        DataError: Likewise.
    """
    first = next(iter_file(path))
    return detect_form(first.values, first.location, form=form, needs_targets=needs_targets), first.values


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
        raise DataError(
            f"{record.location} has the columns {_listed(record.values)}, but rows of {form.title} need "
            f"{form.signature}, as those before it.",
            hint="put each form into a file of its own.",
        )
    return form.make(record, needs_targets)


def describe_data(form: Form, examples: Sequence[Example], path: Path | str, columns: Iterable[str] = ()) -> str:
    """One line for people: what was read, and which columns are not used.

    >>> describe_data(FORMS["question"], [Example("Why?", ("So.", "Because."))], "a.csv", ["question", "answer", "id"])
    'a.csv: read as questions and answers: examples 1, targets 2; not used: id'

    Args:
        form: Of the data.
        examples: All of them.
        path: Where they are from.
        columns: Of the first row.
    """
    num_targets = sum(
        len(example.targets) + sum(message.role == "assistant" for message in example.messages) for example in examples
    )
    return describe_counts(form, len(examples), num_targets, path, columns)


def describe_counts(
    form: Form, num_examples: int, num_targets: int, path: Path | str, columns: Iterable[str] = ()
) -> str:
    """As `describe_data`, of so many examples with so many targets and earlier answers."""
    unused = [str(column)[:40] for column in form.unused(columns)]
    more = "..." if len(unused) > _MAX_SHOWN else ""
    note = f"; not used: {', '.join(unused[:_MAX_SHOWN])}{more}" if unused else ""
    return f"{shown(path)}: read as {form.title}: examples {num_examples:,}, targets {num_targets:,}{note}"


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


def _pair(record: Record, needs_targets: bool) -> Example:
    text = render("source", record.values, record.location)
    return Example(text, _targets(record, ("target", "targets"), needs_targets), record.values)


def _text(record: Record, needs_targets: bool) -> Example:
    """A text to learn as it is, with nothing before it."""
    render("text", record.values, record.location)  # refuses what is no text
    return Example("", (str(record.values["text"]),), record.values)


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
        *(Form(name, ((name,),), "chats", partial(_conversation, name)) for name in ("messages", "conversations")),
        Form("prompt", (("prompt",), _COMPLETIONS), "prompts and completions", _prompt, ("system",)),
        Form("instruction", (("instruction",), _OUTPUTS), "instructions", _instruction, ("input", "context", "system")),
        Form("question", (("question",), _ANSWERS), "questions and answers", _question, ("context",)),
        Form("source", (("source",), ("target", "targets")), "sources and targets", _pair),
        Form(
            "document",
            (DOCUMENT_COLUMNS, SUMMARY_COLUMNS),
            "documents and summaries",
            lambda record, needs_targets: summary_example(record, needs_target=needs_targets),
            task="summarization",
        ),
        Form("label", (("text",), ("label",)), "texts and labels", _label, task="classification"),
        Form("tags", (("tokens",), ("tags",)), "tokens and tags", _tags, task="tagging"),
        Form("text", (("text",),), "texts", _text),
    )
}
"""Name -> form, in the order in which messages list them."""
