"""Sets of triples (subject, property, object) -> a text: WebNLG and DART.

WebNLG (challenge 2017, Gardent et al.) is read from the release's XML, JSON lines `{"category", "triples",
"references"}`, and the hub's sets (`modified_triple_sets` with `lex`, or `input` with `target` and `references`). Only
texts whose comment is `good` (or that have none) are read, as the authors of prefix-tuning do; an entry that has texts,
but no good one, is left out.

DART (Nan et al. 2021) is read from the release's JSON (`{"tripleset", "annotations": [{"source", "text"}]}`) and XML,
JSON lines `{"triples", "references", "sources"}`, and the hub's sets. An entry with empty texts only is left out (the
release has one). The references that the official scorer uses, if a row has them (`official_references_3`), are in the
field `official_references`.

Each entry is an example of its own, although many have equal triples: the published scores count them all. Texts become
one line, without outer white space.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

from prefixtune.data.examples import Example
from prefixtune.data.files import Record, join_lines, missing_column, one_line, wrong_value
from prefixtune.errors import DataError

WEBNLG_FORMATS, DART_FORMATS = (".xml", ".jsonl"), (".xml", ".json", ".jsonl")
Triple = tuple[str, str, str]
#: The categories of the training set of 2017, and those of its test set alone. Later releases train on more of them.
SEEN_CATEGORIES = (
    *("Airport", "Astronaut", "Building", "City", "ComicsCharacter", "Food", "Monument", "SportsTeam"),
    *("University", "WrittenWork"),
)
UNSEEN_CATEGORIES = ("Artist", "Athlete", "CelestialBody", "MeanOfTransportation", "Politician")
_TRIPLES = ("triples", "tripleset", "input", "modified_triple_sets")
_TEXTS = ("lex", "annotations")


class _Text(NamedTuple):
    """A text, what is said about it (its quality in WebNLG, where it is from in DART), and its language, or empty."""

    text: str
    comment: str = ""
    language: str = ""


def linearize_webnlg(triples: Iterable[Triple]) -> str:
    """Triples as the model reads them (the authors' linearization, with its leading bar).

    >>> linearize_webnlg([("Aarhus", "leaderName", "Jacob_Bundsgaard"), ("Aarhus", "country", "Denmark")])
    ' | Aarhus : leaderName : Jacob_Bundsgaard | Aarhus : country : Denmark'
    """
    return "".join(f" | {subject} : {relation} : {target}" for subject, relation, target in triples)


def linearize_dart(triples: Iterable[Triple]) -> str:
    """Triples as the model reads them (the authors' linearization: relations in lower case).

    >>> linearize_dart([("Mars Hill College", "JOINED", "1973"), ("Mars Hill College", "LOCATION", "Mars Hill")])
    'Mars Hill College : joined : 1973 | Mars Hill College : location : Mars Hill'
    """
    return " | ".join(f"{subject} : {relation.lower()} : {target}" for subject, relation, target in triples)


def check_triples(value: Any, column: str, location: str) -> tuple[Triple, ...]:
    """A list of triples, each of three texts; outer white space is removed, and an inner line break becomes one space.

    A part may be empty, as DART's tables have empty cells. A triple may be one text.

    >>> check_triples(["Aarhus | leaderName | Jacob_Bundsgaard"], "input", "line 1")
    (('Aarhus', 'leaderName', 'Jacob_Bundsgaard'),)

    Raises:
        DataError: It is not such a list, or is empty.
    """
    if not isinstance(value, list) or not value:
        raise wrong_value(location, column, value, 'a list as [["subject", "property", "object"], ...]')
    triples: list[Triple] = []
    for triple in value:
        parts = join_lines(triple).split(" | ") if isinstance(triple, str) else triple
        if not isinstance(parts, list | tuple) or len(parts) != 3 or not all(isinstance(part, str) for part in parts):
            raise wrong_value(location, column, triple, "a triple of three texts")
        subject, relation, target = map(join_lines, parts)
        triples.append((subject, relation, target))
    return tuple(triples)


def webnlg_examples(records: Iterable[Record]) -> list[Example | None]:
    """The example of each row, or None where it has no good text; `fields` is the row, with `triples`.

    Groups: `triples` (their number), `category`, and `seen`: `seen` or `unseen`, where the rows say it, or where the
    categories are those of 2017 with some that are in its test set alone.

    Raises:
        DataError: A row is wrong, or the texts are in several languages: as references they would be no other wording.
    """
    records = list(records)
    categories = {category for record in records if isinstance(category := record.values.get("category"), str)}
    by_category = categories <= {*SEEN_CATEGORIES, *UNSEEN_CATEGORIES} and not categories <= {*SEEN_CATEGORIES}
    examples: list[Example | None] = []
    languages: set[str] = set()
    for record in records:
        triples, groups = _triples(record)
        category, seen = record.values.get("category"), record.values.get("seen")
        if category is not None:
            groups["category"] = one_line(category, "category", record.location)
            seen = category in SEEN_CATEGORIES if seen is None and by_category else seen
        if seen is not None:
            if not isinstance(seen, bool):
                raise wrong_value(record.location, "seen", seen, "true or false")
            groups["seen"] = "seen" if seen else "unseen"
        texts = _texts(record, "comment") or []
        if "comments" in record.values:
            comments = _strings(record, "comments")
            if len(comments) != len(texts):
                raise wrong_value(record.location, "comments", comments, f"one for each of {len(texts)} references")
            texts = [text._replace(comment=comment) for text, comment in zip(texts, comments, strict=True)]
        languages |= {text.language for text in texts} - {""}
        if len(languages) > 1:
            raise DataError(
                f"{record.location}: the texts so far are in the languages {', '.join(sorted(languages))}.",
                hint="keep the texts of one language: remove those with another `lang`.",
            )
        good = [text.text for text in texts if text.comment in ("good", "")]
        fields = {**record.values, "triples": triples, **({} if seen is None else {"seen": seen})}
        example = Example(linearize_webnlg(triples), good, fields, groups)
        examples.append(example if good or not texts else None)
    return examples


def dart_example(record: Record) -> Example | None:
    """The example of a row, or None where all of its texts are empty; `fields` is the row, with `triples`.

    Groups: `triples` (their number), and `source`, if all texts of the row come from the same source.

    Raises:
        DataError: The row is wrong.
    """
    triples, groups = _triples(record)
    texts = _texts(record, "source")
    sources = {text.comment for text in texts or ()} - {""}
    sources |= {*_strings(record, "sources"), *_strings(record, "target_sources")}
    if len(sources) == 1:
        groups["source"] = sources.pop()
    fields = {**record.values, "triples": triples}
    if "official_references_3" in fields:
        fields["official_references"] = _strings(record, "official_references_3")
    example = Example(linearize_dart(triples), [text.text for text in texts or ()], fields, groups)
    return example if texts or texts is None else None


def _triples(record: Record) -> tuple[tuple[Triple, ...], dict[str, str]]:
    """The triples of a row, and the group of their number."""
    column = next((name for name in _TRIPLES if name in record.values), None)
    if column is None:
        raise missing_column(record.location, _TRIPLES[:2], record.values)
    value = record.values[column]
    if isinstance(value, dict):  # of the hub, with several sets of which the first is meant
        value = next(iter(value.get("mtriple_set") or ()), None)
    triples = check_triples(value, column, record.location)
    return triples, {"triples": str(len(triples))}


def _texts(record: Record, comment: str) -> list[_Text] | None:
    """The texts of a row that are not empty; None: it has no column of texts, as data that is only for generation.

    Args:
        record: The row.
        comment: The key that says something about an object's text.
    """
    values, location = record.values, record.location
    column = next((name for name in _TEXTS if name in values), None)
    if column is not None:
        texts = [_commented(item, comment, column, location) for item in _objects(values[column])]
        if not texts:
            raise wrong_value(location, column, values[column], "a list of at least one object")
        return [text for text in texts if text.text]
    if "references" not in values and "target" not in values:
        return None
    # GEM's training rows have an empty list of references and one target.
    references = values.get("references") or [values.get("target")]
    if not isinstance(references, list):
        raise wrong_value(location, "references", references, "a list of texts")
    return [_Text(one_line(text, "references", location)) for text in references]


def _objects(value: Any) -> list[Any]:
    """A list of objects; or, as in some sets of the hub, an object of lists."""
    if isinstance(value, dict):
        lists = {key: items for key, items in value.items() if isinstance(items, list)}
        return [dict(zip(lists, items, strict=False)) for items in zip(*lists.values(), strict=False)]
    return value if isinstance(value, list) else []


def _commented(item: Any, comment: str, column: str, location: str) -> _Text:
    """An object of a text; in XML, what is said about it is always the comment."""
    said = item.get(comment, item.get("comment")) if isinstance(item, dict) else None
    if not isinstance(said, str) or not isinstance(item.get("text"), str):
        raise wrong_value(location, column, item, f"an object with texts under {comment!r} and 'text'")
    return _Text(join_lines(item["text"]), said, str(item.get("lang") or ""))


def _strings(record: Record, column: str) -> list[str]:
    """The texts of a column that may be absent."""
    value = record.values.get(column, [])
    if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
        raise wrong_value(record.location, column, value, "a list of texts")
    return value
