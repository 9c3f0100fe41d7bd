"""Rows of the benchmarks -> examples: E2E, WebNLG, DART and SciTLDR, as released, as JSON lines, and of the hub.

E2E NLG (Novikova et al. 2017) describes restaurants from attribute-value pairs. Rows have `mr` and `ref` (the release's
CSV; only `mr` in the test set without references), `mr` and `references` (JSON lines), or `meaning_representation` with
`human_reference`, or with `target` and `references` (the hub). Names of columns may be in either case. References keep
their words and case; in the data that the authors of prefix-tuning released, texts are also tokenized, as in `city
centre .`, but BLEU's tokenizer expects the original spelling.

WebNLG (challenge 2017, Gardent et al.) and DART (Nan et al. 2021) are texts about sets of triples (subject, property,
object). Rows are those of the XML (see `benchmark_rows`), `{"category", "triples", "references"}` or, of DART,
`{"triples", "references", "sources"}`, DART's JSON (`{"tripleset", "annotations": [{"source", "text"}]}`), or the
hub's. Of WebNLG only texts whose comment is `good` (or that have none) are read, as the authors of prefix-tuning do; an
entry that has texts, but no good one, is left out. Of DART an entry with empty texts only is left out (the release has
one). The references that its official scorer uses, if a row has them (`official_references_3`), are in the field
`official_references`. Each entry is an example of its own, although many have equal triples: the published scores count
them all.

SciTLDR (SciTLDR-A, Cachola et al. 2020): abstracts (`source`, a list of sentences, or `document`) and their summaries
(`target` or `references`).

Texts become one line, without outer white space, because generation for these tasks bans line breaks.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from prefixtune.data.examples import Example
from prefixtune.data.files import Record, join_lines, missing_column, one_line, wrong_value
from prefixtune.errors import DataError, did_you_mean, short_repr


def _texts_in(record: Record, names: Sequence[str]) -> list[str] | None:
    """The texts of the first of these columns that is filled; None: there is no such column."""
    present = [name for name in names if name in record.values]
    if not present:
        return None
    # GEM's training rows have an empty list of references and one target.
    column = next((name for name in present if record.values[name] not in (None, [])), present[0])
    value = record.values[column]
    texts = value if isinstance(value, list) and value else [value]
    return [one_line(text, column, record.location) for text in texts]


# --- E2E and SciTLDR -------------------------------------------------------------------------------------------------

#: The eight attributes of E2E -> their names in the linearization (the authors': four are renamed).
ATTRIBUTES = {name: name for name in ("name", "food", "customer rating", "area", "near")}
ATTRIBUTES |= {"eatType": "Type", "priceRange": "price", "familyFriendly": "family friendly"}
_SHAPE = "write each attribute once, as in name[Blue Spice], eatType[pub], area[riverside]."
_PAIR = re.compile(r"([^\[\],]*)\[([^\[\]]*)\]\s*(?:,|$)")


def parse_mr(mr: str) -> dict[str, str]:
    """The attributes of a meaning representation, in its order.

    >>> parse_mr("name[Blue Spice], eatType[coffee shop]")
    {'name': 'Blue Spice', 'eatType': 'coffee shop'}

    Raises:
        DataError: The text is malformed, or an attribute is unknown, empty or given twice.
    """
    values: dict[str, str] = {}
    position = 0
    while position < len(mr) or not values:
        pair = _PAIR.match(mr, position)
        attribute, value = ("", "") if pair is None else (pair[1].strip(), pair[2].strip())
        if pair is None or not value or attribute in values:
            raise DataError(f"{short_repr(mr)} is malformed from {short_repr(mr[position:])} on.", hint=_SHAPE)
        if attribute not in ATTRIBUTES:
            raise DataError(f"there is no attribute {short_repr(attribute)}.", hint=did_you_mean(attribute, ATTRIBUTES))
        values[attribute] = value
        position = pair.end()
    return values


def linearize_e2e(mr: str) -> str:
    """A meaning representation as the model reads it (the authors' linearization; the order is kept).

    >>> linearize_e2e("name[The Vaults], eatType[pub], priceRange[more than £30], familyFriendly[yes]")
    'name : The Vaults | Type : pub | price : more than £30 | family friendly : yes'

    Raises:
        DataError: As `parse_mr`.
    """
    return " | ".join(f"{ATTRIBUTES[attribute]} : {value}" for attribute, value in parse_mr(mr).items())


def e2e_example(record: Record) -> Example:
    """The example of a row; `fields` is `{"mr": the original text}`, and the group `attributes` their number.

    Raises:
        DataError: The meaning representation is malformed, or columns of references are there and none is filled.
    """
    row = Record(record.location, {name.lower(): value for name, value in record.values.items()})
    mr = row.values.get("mr", row.values.get("meaning_representation"))
    if not isinstance(mr, str):
        raise wrong_value(row.location, "mr", mr, "text")
    try:
        source, groups = linearize_e2e(mr.strip()), {"attributes": str(len(parse_mr(mr.strip())))}
    except DataError as error:
        raise DataError(f"{row.location}: {error.message}", hint=error.hint) from error
    texts = _texts_in(row, ("references", "ref", "human_reference", "target"))
    return Example(source, texts or (), {"mr": mr.strip()}, groups)


def scitldr_example(record: Record) -> Example:
    """The example of a row, with all of its summaries; `fields` is the row.

    Raises:
        DataError: A column is missing or has no text.
    """
    columns = ("document", "source"), ("references", "target")
    document, summaries = (_texts_in(record, names) for names in columns)
    if document is None or summaries is None:
        raise missing_column(record.location, columns[0 if document is None else 1], record.values)
    return Example(" ".join(document), summaries, record.values)


# --- triples ---------------------------------------------------------------------------------------------------------

Triple = tuple[str, str, str]
#: The categories of the training set of 2017, and those of its test set alone. Later releases train on more of them.
SEEN_CATEGORIES = (
    *("Airport", "Astronaut", "Building", "City", "ComicsCharacter", "Food", "Monument", "SportsTeam"),
    *("University", "WrittenWork"),
)
UNSEEN_CATEGORIES = ("Artist", "Athlete", "CelestialBody", "MeanOfTransportation", "Politician")
_TRIPLES = ("triples", "tripleset", "input", "modified_triple_sets")


class _Text(NamedTuple):
    """A text, what is known about it (its quality in WebNLG, where it is from in DART), and its language, or empty."""

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


def webnlg_examples(records: Iterable[Record]) -> list[Example]:
    """The example of each row, but for those without a good text; `fields` is the row, with `triples`.

    Groups: `triples` (their number), `category`, and `seen`: `seen` or `unseen`, where the rows say it, or where the
    categories are those of 2017 with some that are in its test set alone.

    Raises:
        DataError: A row is wrong, or the texts are in several languages: as references they would be no other wording.
    """
    records = list(records)
    categories = {category for record in records if isinstance(category := record.values.get("category"), str)}
    by_category = categories <= {*SEEN_CATEGORIES, *UNSEEN_CATEGORIES} and not categories <= {*SEEN_CATEGORIES}
    examples: list[Example] = []
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
        texts, comments = _texts(record, "comment") or [], _strings(record, "comments")
        if comments and len(comments) != len(texts):
            raise wrong_value(record.location, "comments", comments, f"one for each of {len(texts)} references")
        texts = [text._replace(comment=said) for text, said in zip(texts, comments, strict=True)] if comments else texts
        languages |= {text.language for text in texts} - {""}
        if len(languages) > 1:
            raise wrong_value(record.location, "lang", sorted(languages), "one language for all texts")
        good = [text.text for text in texts if text.comment in ("good", "")]
        fields = {**record.values, "triples": triples, **({} if seen is None else {"seen": seen})}
        if good or not texts:
            examples.append(Example(linearize_webnlg(triples), good, fields, groups))
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
    column = next((name for name in ("lex", "annotations") if name in record.values), None)
    if column is None:
        texts = _texts_in(record, ("references", "target"))
        return None if texts is None else [_Text(text) for text in texts]
    value = record.values[column]
    if isinstance(value, dict):  # of the hub: an object of lists
        lists = {key: items for key, items in value.items() if isinstance(items, list)}
        value = [dict(zip(lists, items, strict=False)) for items in zip(*lists.values(), strict=False)]
    if not isinstance(value, list) or not value:
        raise wrong_value(record.location, column, value, "a list of at least one object")
    found: list[_Text] = []
    for item in value:
        # In XML, what is said about it is always the comment.
        said = item.get(comment, item.get("comment")) if isinstance(item, dict) else None
        if not isinstance(said, str) or not isinstance(item.get("text"), str):
            raise wrong_value(record.location, column, item, f"an object with texts under {comment!r} and 'text'")
        found.append(_Text(join_lines(item["text"]), said, str(item.get("lang") or "")))
    return [text for text in found if text.text]


def _strings(record: Record, column: str) -> list[str]:
    """The texts of a column that may be absent."""
    value = record.values.get(column, [])
    if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
        raise wrong_value(record.location, column, value, "a list of texts")
    return value
