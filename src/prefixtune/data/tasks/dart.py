"""DART (Nan et al. 2021): triples from tables, WebNLG and E2E -> a text.

Reads the release's JSON (a list of `{"tripleset", "annotations": [{"source", "text"}]}`) and XML, JSON lines
`{"triples", "references", "sources"}`, and the hub's sets, whose columns are those of the release's JSON, or, in GEM's,
`tripleset`, `target` and `references`.

An empty text is ignored (the release has one), and so is an entry with empty texts only. Each entry is an example of
its own, although many have equal triples: the official scores count them all. The references that the official scorer
uses, if a row has them (`official_references_3`), are in the field `official_references`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from prefixtune.data.examples import Example
from prefixtune.data.files import Record, read_file, task_format
from prefixtune.data.streams import shown
from prefixtune.data.tasks.triples import Triple, check_triples, commented_texts, read_benchmark, references_of
from prefixtune.errors import DataError

DART_FORMATS = (".json", ".jsonl", ".xml")


def linearize(triples: Iterable[Triple]) -> str:
    """Triples as the model reads them (the authors' linearization: relations in lower case).

    >>> linearize([("Mars Hill College", "JOINED", "1973"), ("Mars Hill College", "LOCATION", "Mars Hill")])
    'Mars Hill College : joined : 1973 | Mars Hill College : location : Mars Hill'
    """
    return " | ".join(f"{subject} : {relation.lower()} : {target}" for subject, relation, target in triples)


def read_dart(path: Path) -> list[Example]:
    """Read a DART file (`.json`, `.jsonl` or `.xml`, each also `.gz`), or a set of the `datasets` library.

    Returns:
        One example for each entry; `fields` is the entry, with `triples` and, if the file has them,
        `official_references`; no targets if the file has no texts at all. Groups: `triples` (their number), and
        `source`, if all texts of the entry come from the same source.

    Raises:
        ConfigError: The `datasets` library is needed and not installed.
        DataError: The file or one of its entries is wrong; the message names file and line.
    """
    examples = [example for example in dart_entries(path) if example is not None]
    if not examples:
        raise DataError(f"{shown(path)} has no text: all are empty.", hint="check that it is complete.")
    return examples


def dart_entries(path: Path) -> list[Example | None]:
    """Every entry, as `read_dart` reads it; None for those that it leaves out because they have only empty texts."""
    path = Path(path)
    if task_format(path, DART_FORMATS, ".xml") == ".xml":
        records = [_with_texts(record, record.values.pop("lexicalizations")) for record in read_benchmark(path)]
    else:
        records = [_from_release(record) for record in read_file(path, DART_FORMATS)]
    return [None if record is None else _example(record) for record in records]


def _example(record: Record) -> Example:
    values = record.values
    if "triples" not in values:
        raise DataError(
            f"{record.location}: there is no column 'triples' or 'tripleset'; there are: "
            f"{', '.join(map(str, values)) or 'none'}.",
            hint='write rows as {"triples": [["s", "r", "o"]], "references": ["..."]}.',
        )
    triples = check_triples(values["triples"], "triples", record.location)
    groups = {"triples": str(len(triples))}
    sources = set(_texts(record, "sources"))
    if len(sources) == 1:
        groups["source"] = sources.pop()
    if "official_references_3" in values:
        values = {name: value for name, value in values.items() if name != "official_references_3"}
        values["official_references"] = _texts(record, "official_references_3")
    return Example(linearize(triples), references_of(record), values, groups)


def _texts(record: Record, column: str) -> tuple[str, ...]:
    """The texts of a column that may be absent; a text may be empty."""
    values = record.values.get(column, [])
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise DataError(
            f"{record.location}: {column!r} is {values!r}; a list of texts is needed.",
            hint="write one, or leave the column out.",
        )
    return tuple(values)


def _with_texts(record: Record, texts: Sequence[tuple[str, str]]) -> Record | None:
    """A record with its (source, text) pairs, without empty texts; None if all of them are empty."""
    kept = [(source, text) for source, text in texts if text]
    if not kept:
        return None if texts else record
    values = {"references": [text for _, text in kept], "sources": [source for source, _ in kept if source]}
    return Record(record.location, {**record.values, **values})


def _from_release(record: Record) -> Record | None:
    """A record with the column names of the JSON lines instead of those of the release or the hub's sets."""
    values = record.values
    if "tripleset" not in values:
        return record
    rest = {name: value for name, value in values.items() if name not in ("tripleset", "annotations")}
    renamed = {**rest, "triples": values["tripleset"]}
    if "annotations" in values:
        texts = commented_texts(values["annotations"], "annotations", "source", record.location)
        return _with_texts(Record(record.location, renamed), texts)
    # GEM's training rows have an empty list of references and one target.
    if "target" in values:
        renamed["references"] = values.get("references") or [values["target"]]
    return Record(record.location, {**renamed, "sources": values.get("target_sources", [])})
