"""SciTLDR: abstracts and their one-sentence summaries.

It is read as released (SciTLDR-A: `source` is an abstract's sentences, `target` its summaries) and as JSON lines
`{"document", "references"}`. Texts become one line, because generation for this task bans line breaks.
"""

from __future__ import annotations

from collections.abc import Sequence

from prefixtune.data.examples import Example
from prefixtune.data.files import Record, missing_column, one_line, wrong_value

SCITLDR_FORMATS = (".jsonl", ".json")


def scitldr_example(record: Record) -> Example:
    """The example of a row, with all of its summaries; `fields` is the row.

    Raises:
        DataError: A column is missing or has no text.
    """
    column, summary_column = _column(record, ("document", "source")), _column(record, ("references", "target"))
    document, summaries = record.values[column], record.values[summary_column]
    if isinstance(document, list):
        document = " ".join(one_line(sentence, column, record.location) for sentence in document)
    if not isinstance(summaries, list) or not summaries:
        raise wrong_value(record.location, summary_column, summaries, "a list of at least one text")
    targets = [one_line(summary, summary_column, record.location) for summary in summaries]
    return Example(one_line(document, column, record.location), targets, record.values)


def _column(record: Record, names: Sequence[str]) -> str:
    """The first of these columns that a record has."""
    for name in names:
        if name in record.values:
            return name
    raise missing_column(record.location, names, record.values)
