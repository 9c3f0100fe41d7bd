"""Forms of data that people have, recognized by their columns: chats, prompts and completions, instructions, texts, ...

A file has one form: that of its first row, which every later row must have too. Other columns are kept in the
examples' `fields`. Where two forms fit, one must be named.

Examples of one turn with equal sources are merged, with all their targets in order: targets of one source share its
computation. A conversation of several turns, and a text, is an example of its own.

A template is the name of one column (`question`), or text with columns in braces (`{name} is {food}`). Only `{column}`
is replaced, by the exact name of a column, spaces and dots included: there are no attributes, indices, conversions or
format specs. `{{` and `}}` are literal braces. Texts lose their outer white space; inner line breaks stay.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from pydantic_core import from_json

from prefixtune.data.examples import Example, ExampleLike, Message, chat_example, merge_examples, parse_messages
from prefixtune.data.files import Record, is_tag, iter_file, join_lines, listed, missing_column, wrong_value
from prefixtune.data.streams import shown
from prefixtune.errors import ConfigError, DataError, describe_value, did_you_mean, short_repr
from prefixtune.pages.format import spread_out

_HINT = 'write {"source": "...", "target": "..."}; `prefixtune.data.as_examples` takes templates for other records.'
_MOST_SAMPLED, _MOST_SHOWN, _MOST_MESSAGES, _MOST_CHARS = 100, 24, 50, 2_000
"""Of a file's beginning, for people."""


@dataclass(frozen=True)
class Form:
    """A form of data.

    Attributes:
        name: What `--form` calls it.
        columns: Its columns; of each group one must be there, and the first that is filled is used. The last group
            holds the targets, but for forms of one group.
        title: What people call it, in the plural.
        make: (row, form, columns or templates by group, whether a target is needed) -> its example.
        optional: Columns that are used too, if they are filled: `system` makes it a chat, and a text that the source is
            about comes after it.
        task: Of the data.
    """

    name: str
    columns: tuple[tuple[str, ...], ...]
    title: str
    make: Callable[[Record, Form, Sequence[Sequence[str]], bool], Example]
    optional: tuple[str, ...] = ()
    task: str = "records"

    @property
    def signature(self) -> str:
        """Its columns, as messages show them."""
        return " + ".join(group[0] for group in self.columns)

    def fits(self, columns: Collection[str], *, needs_targets: bool = True) -> bool:
        """Whether rows with these columns have this form.

        Args:
            columns: Of a row.
            needs_targets: The column of the targets must be there.
        """
        groups = self.columns if needs_targets or len(self.columns) == 1 else self.columns[:-1]
        return all(any(name in columns for name in group) for group in groups)

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
        prefer: The name of the form that is taken if it fits, whatever else does.
        needs_targets: Rows without a column of targets are refused.

    Raises:
        ConfigError: There is no form of that name, or several fit.
        DataError: None fits, or not the one that was named.
    """
    if form and form not in FORMS:
        raise ConfigError(f"there is no form {form!r}.", hint=did_you_mean(form, FORMS))
    if prefer in FORMS and not form and FORMS[prefer].fits(row, needs_targets=needs_targets):
        return FORMS[prefer]
    known = [FORMS[form]] if form else list(FORMS.values())
    fitting = [] if form else fitting_forms(row)
    fitting = fitting or [one for one in known if one.fits(row, needs_targets=needs_targets)]
    if len(fitting) > 1:
        what = f"{location} can be read as {', or as '.join(f'{one.title} ({one.signature})' for one in fitting)}."
        raise ConfigError(what, hint=f"choose one: {' or '.join(f'--form {one.name}' for one in fitting)}.")
    if not fitting:
        what = f"{location} has the columns {listed(row)}; known are: {'; '.join(one.signature for one in known)}."
        raise DataError(what, hint="rename the columns, or name them, as in --source question --target answer.")
    return fitting[0]


def fitting_forms(row: Mapping[str, Any]) -> list[Form]:
    """The forms with targets that a row may have, by its columns; where there are several, one must be chosen.

    Args:
        row: Column -> value; the first of its file.
    """
    fitting = [one for one in FORMS.values() if one.fits(row)]
    # A text is a whole example only where nothing else is one.
    return [one for one in fitting if one.name != "text"] or fitting


# --- reading ---------------------------------------------------------------------------------------------------------


def make_example(
    record: Record, form: Form, *, needs_targets: bool = False, templates: Sequence[str | None] = (None, None)
) -> Example:
    """The example of one row.

    Args:
        record: The row.
        form: Of its file.
        needs_targets: A row without a target is refused.
        templates: Of the source and the target, instead of the form's columns; an empty one: there is no target.

    Raises:
        DataError: The row is wrong, or has another form.
    """
    columns = [
        group if template is None else (template,) for template, group in zip(templates, form.columns, strict=False)
    ]
    if tuple(templates) == (None, None) and not form.fits(record.values, needs_targets=needs_targets):
        what = f"{record.location} has the columns {listed(record.values)}, but {form.title} need {form.signature}."
        raise DataError(what, hint="put rows of each form into a file of their own.")
    return form.make(record, form, columns, needs_targets)


def preview_of(path: Path, form: str | None) -> list[dict[str, Any]]:
    """Some of a file's first examples for people, long texts and conversations shortened; or a text's beginning.

    Args:
        path: The file.
        form: The name of its form; empty: it is not known, and nothing is shown; None: it is a text.
    """
    if form is None:
        with open(path, "rb") as file:
            return [{"source": file.read(4 * _MOST_CHARS).decode("utf-8", "ignore")[:_MOST_CHARS]}]
    first = list(itertools.islice(iter_file(path), _MOST_SAMPLED)) if form else []
    return [_shown(make_example(record, FORMS[form])) for record in spread_out(first, _MOST_SHOWN)]


def _shown(example: Example) -> dict[str, Any]:
    targets = [target[:_MOST_CHARS] for target in example.targets[:3]]
    if not example.messages:
        return {"source": example.source[:_MOST_CHARS], "targets": targets}
    turns: list[tuple[str, str]] = [*example.messages, *(("assistant", target) for target in targets[:1])]
    return {
        "messages": [
            {"role": role, "content": content[:_MOST_CHARS], "trained": role == "assistant"}
            for role, content in turns[:_MOST_MESSAGES]
        ]
    }


def as_examples(
    examples: Sequence[ExampleLike],
    source: str | None = None,
    target: str | None = None,
    *,
    form: str = "",
    needs_targets: bool = False,
) -> list[Example]:
    """The examples of a list of `Example`s or of dicts, which are rows as in a file.

    >>> as_examples([{"source": "1+1", "target": "2"}])[0].targets
    ('2',)
    >>> as_examples([{"name": "Aromi", "food": "Italian", "text": "Eat there."}], "{name} is {food}", "text")[0].source
    'Aromi is Italian'

    Args:
        examples: `Example`s, or dicts of one form, such as `{"messages": [...]}`; an `Example` alone has groups.
        source: Template of the source; equal sources of dicts are merged then, as in a file.
        target: Template of the target.
        form: The form that rows must have; empty: any that fits.
        needs_targets: A row is refused if it has no target.

    Raises:
        ConfigError: A template is malformed, or several forms fit.
        DataError: It is not a list of these, or one of them is wrong.
    """
    one_form = example_form(examples, form=form) if source is None else TEMPLATES
    needed = needs_targets if source is None else target is not None
    made: list[Example] = []
    for number, one in enumerate(examples, start=1):
        if isinstance(one, Mapping) and one_form is not None:
            row = Record(f"example {number}", dict(one))
            one = make_example(row, one_form, needs_targets=needed, templates=(source, target))
        if not isinstance(one, Example):
            raise DataError(f"example {number} is {describe_value(one)}, but must be a dict or an Example.", hint=_HINT)
        made.append(one)
    return merge_examples(made) if source is not None and any(isinstance(one, Mapping) for one in examples) else made


def example_form(examples: Sequence[Any], *, form: str = "") -> Form | None:
    """The form of a list's dicts, by the first; None: there is none.

    Raises:
        ConfigError: Several forms fit, or there is no form of that name.
        DataError: It is no list, or no form fits.
    """
    if isinstance(examples, str | Mapping) or not (hasattr(examples, "__len__") and hasattr(examples, "__iter__")):
        raise DataError(f"the examples are {describe_value(examples)}, not a list of dicts or of Example.", hint=_HINT)
    rows = ((number, one) for number, one in enumerate(examples, start=1) if isinstance(one, Mapping))
    number, row = next(rows, (0, None))
    return None if row is None else detect_form(row, f"example {number}", form=form, needs_targets=False)


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
    earlier = sum(message.role == "assistant" for example in examples for message in example.messages)
    num_targets = earlier + sum(len(example.targets) for example in examples)
    unused = form.unused(columns)
    note = f"; not used: {listed(unused)}" if unused else ""
    return f"{shown(path)}: read as {form.title}: examples {len(examples):,}, targets {num_targets:,}{note}"


# --- templates -------------------------------------------------------------------------------------------------------

_PART = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]")


def check_template(template: str) -> tuple[str, ...]:
    """The columns that a template names, in order.

    >>> check_template("{name} is {food}, {{sic}}"), check_template("question")
    (('name', 'food'), ('question',))

    Raises:
        ConfigError: A brace is not closed or not opened, or no column is named.
    """
    parts = list(_PART.finditer(template))
    columns = [part[1] for part in parts if part[1] is not None] if parts else [template if template.strip() else ""]
    if not columns or not all(columns) or any(part[0] in ("{", "}") for part in parts):
        raise ConfigError(
            f"the template {short_repr(template)} names no column, or has a brace that stands alone.",
            hint="write a column's name, or text with {column} in it; {{ and }} are literal braces.",
        )
    return tuple(columns)


def render(template: str, record: Mapping[str, Any], location: str) -> str:
    """One record as text.

    >>> render("{name} is {food}", {"name": "Aromi", "food": "Italian"}, "line 1")
    'Aromi is Italian'
    >>> render("name", {"name": "Aromi", "food": "Italian"}, "line 1")
    'Aromi'

    Args:
        template: A column's name, or text with `{column}` in it.
        record: Column -> text, number or truth value (`true`, `false`).
        location: The record's location, for messages.

    Raises:
        ConfigError: The template is malformed.
        DataError: A column is missing or has no text, or the result is empty.
    """
    texts: dict[str, str] = {}
    for column in check_template(template):
        if column not in record:
            raise missing_column(location, [column], record)
        value = record[column]
        if not isinstance(value, str | int | float) or (isinstance(value, float) and not math.isfinite(value)):
            raise wrong_value(location, column, value, "text, a number or a truth value")
        texts[column] = str(value).lower() if isinstance(value, bool) else str(value)
    if template in texts:
        text = texts[template].strip()
    else:
        text = _PART.sub(lambda part: part[0][0] if part[1] is None else texts[part[1]], template).strip()
    if not text:
        raise wrong_value(location, template, text, "text")
    return text


# --- rows -> examples ------------------------------------------------------------------------------------------------


def _present(record: Record, names: Sequence[str]) -> str:
    """The first of these columns that a row has filled; else the first that it has; else the last one."""
    present = [name for name in names if name in record.values]
    return next((name for name in present if _is_filled(record.values[name])), [*present, names[-1]][0])


def _is_filled(value: Any) -> bool:
    """Whether a cell holds something; white space is nothing."""
    return bool(value.strip()) if isinstance(value, str) else value is not None and value != []


def _text_of(names: Sequence[str], record: Record) -> str:
    return render(_present(record, names), record.values, record.location)


def _targets(record: Record, names: Sequence[str], needed: bool) -> list[str]:
    """The targets of a row: one, or several if the column holds a list."""
    column, row = _present(record, names), dict(record.values)
    value = row.get(column)
    # Of answers that also say where they begin, as SQuAD's do, the texts.
    if isinstance(value, Mapping):
        value = row[column] = value.get("text")
    if not needed and not _is_filled(value):
        return []
    if not isinstance(value, list):
        return [render(column, row, record.location)]
    if not value:
        raise wrong_value(record.location, column, value, "at least one target")
    texts = [one.get("text") if isinstance(one, Mapping) else one for one in value]
    return [render(column, {column: text}, record.location) for text in texts]


def _pair(record: Record, form: Form, columns: Sequence[Sequence[str]], needs_targets: bool) -> Example:
    """A source, with the texts that it is about after empty lines, and its targets."""
    source = _text_of(columns[0], record)
    about = [name for name in form.optional if name != "system" and _is_filled(record.values.get(name))]
    source = "\n\n".join([source, *(_text_of((name,), record) for name in about)])
    targets = _targets(record, columns[1], needs_targets)
    if form.task == "summarization":
        # Generation for these tasks bans line breaks.
        return Example(join_lines(source), [join_lines(target) for target in targets], record.values)
    messages = (*_system(record), Message("user", source)) if "system" in form.optional else ()
    return Example(source, targets, record.values, messages=messages)


def _system(record: Record) -> list[Message]:
    """The message of the column `system`; none, where it is empty."""
    return [Message("system", _text_of(("system",), record))] if _is_filled(record.values.get("system")) else []


def _chat(record: Record, messages: list[Message], needs_targets: bool) -> Example:
    for column in ("tools", "functions"):
        if record.values.get(column) not in (None, [], "", "[]"):
            raise wrong_value(record.location, column, record.values[column], "an empty list (no calls are learned)")
    example = chat_example(messages, f"{record.location}: the conversation", fields=record.values)
    if not example.targets:  # they may have a column of their own
        example = replace(example, targets=_targets(record, ("target", "targets"), needed=False))
    if needs_targets and not example.targets:
        raise DataError(f"{record.location}: the user's turn is the last.", hint="add the answer, or drop the turn.")
    return example


def _conversation(record: Record, form: Form, columns: Sequence[Sequence[str]], needs_targets: bool) -> Example:
    return _chat(record, parse_messages(record.values[form.name], form.name, record.location), needs_targets)


def _prompt(record: Record, form: Form, columns: Sequence[Sequence[str]], needs_targets: bool) -> Example:
    """Texts, or messages of which both or one of the two consist."""
    answer = _present(record, columns[1])
    if not any(_holds_messages(record.values.get(column)) for column in ("prompt", answer)):
        return _pair(record, form, columns, needs_targets)
    messages = [*_system(record), *_messages(record, "prompt", "user")]
    if _is_filled(record.values.get(answer)):
        messages += _messages(record, answer, "assistant")
    return _chat(record, messages, needs_targets)


def _holds_messages(value: Any) -> bool:
    """Whether a value is a list of messages, or its JSON, as a cell of a table holds it."""
    # Most texts are none, and need not be parsed.
    if isinstance(value, str) and value.lstrip().startswith("[") and value.rstrip().endswith("}]"):
        with contextlib.suppress(ValueError):
            value = from_json(value)
    known = ({"role", "content"}, {"from", "value"})
    rows = value if isinstance(value, list) else []
    return bool(rows) and all(isinstance(row, dict) and any(keys <= row.keys() for keys in known) for row in rows)


def _messages(record: Record, column: str, role: Literal["user", "assistant"]) -> list[Message]:
    if _holds_messages(record.values[column]):
        return parse_messages(record.values[column], column, record.location)
    return [Message(role, _text_of((column,), record))]


def _text(record: Record, form: Form, columns: Sequence[Sequence[str]], needs_targets: bool) -> Example:
    """A text to learn as it is, with nothing before it."""
    _text_of(("text",), record)  # refuses what is no text
    return Example("", (str(record.values["text"]),), record.values)


def _label(record: Record, form: Form, columns: Sequence[Sequence[str]], needs_targets: bool) -> Example:
    """A text and its label: numbers but whole ones are refused, because an amount is not a class."""
    column = _present(record, columns[1])
    label = record.values.get(column)
    if isinstance(label, float) or (isinstance(label, list) and (len(label) != 1 or isinstance(label[0], float))):
        raise wrong_value(record.location, column, label, "one text, whole number or truth value")
    return _pair(record, form, columns, needs_targets)


def _tags(record: Record, form: Form, columns: Sequence[Sequence[str]], needs_targets: bool) -> Example:
    """Tokens and their tags in the BIO scheme; `I-TYPE` may also begin a span, as in older files."""
    (source, *_), (target, *_) = columns
    tokens = _strings(record, source, "tokens without white space", lambda token: token.split() == [token])
    if not needs_targets and not record.values.get(target):
        return Example(" ".join(tokens), (), {"tokens": tuple(tokens)})
    tags = _strings(record, target, "tags of the BIO scheme (O, B-TYPE or I-TYPE)", is_tag)
    if len(tokens) != len(tags):
        raise wrong_value(record.location, target, tags, f"a list of {len(tokens)} tags, one for each token,")
    return tagged(tokens, tags)


def _strings(record: Record, column: str, what: str, fits: Callable[[str], bool]) -> list[str]:
    """The texts of a column, each of which fits."""
    if column not in record.values:
        raise missing_column(record.location, (column,), record.values)
    values: Any = record.values[column]
    if not isinstance(values, list) or not values:
        raise wrong_value(record.location, column, values, f"a list of {what}")
    for value in values:
        if not isinstance(value, str) or not fits(value):
            raise wrong_value(record.location, column, value, f"a list of {what}")
    return values


def tagged(tokens: Sequence[str], tags: Sequence[str]) -> Example:
    """The example of one sentence.

    >>> example = tagged(["The", "Grey", "Wolf"], ["O", "B-TRAIN", "I-TRAIN"])
    >>> example.source, example.targets
    ('The Grey Wolf', ('O B-TRAIN I-TRAIN',))
    >>> example.fields["tags"]
    ('O', 'B-TRAIN', 'I-TRAIN')
    """
    return Example(" ".join(tokens), (" ".join(tags),), {"tokens": tuple(tokens), "tags": tuple(tags)})


_ABOUT, _SUMMARIES = ("input", "context", "system"), (("document", "article"), ("summary", "highlights"))
FORMS: dict[str, Form] = {
    form.name: form
    for form in (
        Form("messages", (("messages",),), "chats", _conversation),
        Form("conversations", (("conversations",),), "chats", _conversation),
        Form("prompt", (("prompt",), ("completion", "response")), "prompts and completions", _prompt, ("system",)),
        Form("instruction", (("instruction",), ("output", "response")), "instructions", _pair, _ABOUT),
        Form("question", (("question",), ("answer", "answers")), "questions and answers", _pair, ("context",)),
        Form("source", (("source",), ("target", "targets")), "sources and targets", _pair),
        Form("document", _SUMMARIES, "documents and summaries", _pair, task="summarization"),
        Form("label", (("text",), ("label",)), "texts and labels", _label, task="classification"),
        Form("tags", (("tokens",), ("tags",)), "tokens and tags", _tags, task="tagging"),
        Form("text", (("text",),), "texts", _text),
    )
}
"""Name -> form, in the order in which messages list them."""
TEMPLATES = Form("", (("",), ("",)), "rows of named columns", _pair)
"""Of data whose columns are named."""
