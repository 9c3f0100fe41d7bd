"""What an uploaded file holds, read row by row as training reads it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from prefixtune.data.examples import Example, Message, Role, merge_key
from prefixtune.data.files import Record
from prefixtune.data.forms import FORMS, Form, describe_counts, detect_form, fitting_forms, make_example
from prefixtune.errors import DataError

__all__ = ["FileFacts", "FileReport", "SampledExample", "document_facts", "read_facts"]


MAX_ROWS = 1_000_000
"""Most rows of an uploaded file."""
_MAX_COLUMNS = 50
_MAX_COLUMN_CHARS = 80
_MAX_SAMPLED = 100
_MAX_SAMPLE_CHARS = 500_000
_MAX_SHOWN_CHARS = 1_000
"""Characters of the example's source and target that are kept, at most."""


class FileFacts(BaseModel):
    """What an uploaded file holds."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    summary: str = Field("", description="One line for people.")
    form: str = Field(
        "", description="As jobs name it; `document`: a text; empty: several fit, and a job must name one of `forms`."
    )
    forms: list[str] = Field([], description="All forms that its columns fit.")
    task: str = Field("records", description="Of the form.")
    rows: int = Field(0, description="Of the file; 0 for a document.")
    examples: int = Field(0, description="After equal sources are merged; 0 where the form is not known.")
    targets: int = Field(
        0, description="With earlier answers of conversations; 0: nothing to train on, as in a file of questions."
    )
    columns: list[str] = Field([], description=f"Of the first row, at most {_MAX_COLUMNS}.")
    characters: int = Field(0, description="Of all examples, or of the document.")
    longest: int = Field(0, description="Characters of the longest example.")
    source: str = Field(
        "", description=f"Of the first example, or of the document; at most {_MAX_SHOWN_CHARS:,} characters."
    )
    target: str = Field("", description="Of the first example, likewise.")


class SampledExample(BaseModel):
    """An example as it is kept for a preview.

    Attributes:
        source: As in `Example`, like the others.
        targets: Likewise.
        messages: Role and text of each.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: str
    targets: list[str]
    messages: list[tuple[Role, str]] = []

    @classmethod
    def of(cls, example: Example) -> SampledExample:
        """What is kept of an example."""
        messages = [(message.role, message.content) for message in example.messages]
        return cls(source=example.source, targets=list(example.targets), messages=messages)

    @property
    def example(self) -> Example:
        """The example."""
        messages = tuple(Message(*message) for message in self.messages)
        return Example(self.source, tuple(self.targets), messages=messages)


class FileReport(BaseModel):
    """What was read of a file.

    Attributes:
        facts: Of all of it.
        sample: Some of its examples, evenly spaced, the first one among them; none of a document.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    facts: FileFacts
    sample: list[SampledExample] = []


def read_facts(records: Iterable[Record], filename: str) -> FileReport:
    """Read all rows.

    Args:
        records: The rows, perhaps of a file that still grows.
        filename: For the summary.

    Raises:
        PrefixError: A row is wrong, as in training; or there are too many.
    """
    counter: _Counter | None = None
    for number, record in enumerate(records, start=1):
        if number > MAX_ROWS:
            raise DataError(f"{filename} has more than {MAX_ROWS:,} rows.", hint="leave some out.")
        counter = counter or _Counter(record)
        counter.add(record)
    if counter is None:
        raise DataError(f"{filename} has no rows; at least one is needed.", hint="check that it is complete.")
    return FileReport(facts=counter.facts(filename), sample=[SampledExample.of(one) for one in counter.sample.examples])


class _Sample:
    """Evenly spaced examples, of bounded number and size."""

    def __init__(self) -> None:
        self.examples: list[Example] = []
        self._sizes: list[int] = []
        self._seen, self._every = 0, 1

    def add(self, example: Example, size: int) -> None:
        """Keep an example of so many characters, or not."""
        if self._seen % self._every == 0 and size <= _MAX_SAMPLE_CHARS:
            self.examples.append(example)
            self._sizes.append(size)
        self._seen += 1
        while len(self.examples) > _MAX_SAMPLED or sum(self._sizes) > _MAX_SAMPLE_CHARS:
            self.examples, self._sizes, self._every = self.examples[::2], self._sizes[::2], 2 * self._every


class _Counter:
    """Counts the examples of a file's rows, and keeps a sample.

    Args:
        first: The first row, which has the form of the file.

    Raises:
        DataError: It has no known form.
    """

    def __init__(self, first: Record) -> None:
        self._columns = list(map(str, first.values))
        fitting = fitting_forms(first.values)
        # Questions may stand alone: those about a document.
        self._needs_targets = bool(fitting) or "question" not in first.values
        if not fitting and not self._needs_targets:
            fitting = [FORMS["question"]]
        self._forms = fitting or [detect_form(first.values, first.location)]
        self._form: Form | None = self._forms[0] if len(self._forms) == 1 else None
        self._rows = self._examples = self._targets = self._characters = self._longest = 0
        self._sources: set[int] = set()
        self.sample = _Sample()
        self._first: Example | None = None

    def add(self, record: Record) -> None:
        """Count one row."""
        self._rows += 1
        if self._form is None:
            return
        example = make_example(record, self._form, needs_targets=self._needs_targets)
        self._first = self._first or example
        answers = [message.content for message in example.messages if message.role == "assistant"]
        self._targets += len(answers) + len(example.targets)
        size = sum(map(len, example.targets)) + (
            sum(len(message.content) for message in example.messages) or len(example.source)
        )
        self._characters += size
        self._longest = max(self._longest, size)
        self.sample.add(example, size)
        key = merge_key(example) if self._form.task == "records" else None
        # 64 bits tell a million sources apart.
        number = self._rows if key is None else hash(key)
        if key is None or number not in self._sources:
            self._examples += 1
        if key is not None:
            self._sources.add(number)

    def facts(self, filename: str) -> FileFacts:
        """What all rows hold."""
        shown: dict[str, Any] = {
            "rows": self._rows,
            "columns": [name[:_MAX_COLUMN_CHARS] for name in self._columns[:_MAX_COLUMNS]],
        }
        names = [form.name for form in self._forms]
        if self._form is None:
            readings = " or ".join(f"{form.title} ({form.name})" for form in self._forms)
            summary = f"{filename}: rows of {readings}: a job must name the form"
            return FileFacts(summary=summary, forms=names, **shown)
        assert self._first is not None
        summary = describe_counts(self._form, self._examples, self._targets, Path(filename), self._columns)
        return FileFacts(
            summary=summary,
            form=self._form.name,
            forms=names,
            task=self._form.task,
            examples=self._examples,
            targets=self._targets,
            characters=self._characters,
            longest=self._longest,
            source=self._first.source[:_MAX_SHOWN_CHARS],
            target=_first_target(self._first)[:_MAX_SHOWN_CHARS],
            **shown,
        )


def _first_target(example: Example) -> str:
    return example.targets[0] if example.targets else ""


def document_facts(text: str, filename: str) -> FileReport:
    """What a document holds.

    Raises:
        DataError: It has no word.
    """
    if not any(map(str.isalnum, text)):
        raise DataError(f"{filename} holds no words.", hint="check that it is the right file.")
    words = len(text.split())
    counts: dict[str, Any] = {"characters": len(text), "longest": len(text), "source": text[:_MAX_SHOWN_CHARS]}
    summary = f"{filename}: a document of {words:,} {'word' if words == 1 else 'words'}"
    return FileReport(facts=FileFacts(summary=summary, form="document", forms=["document"], task="document", **counts))
