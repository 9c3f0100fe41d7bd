"""E2E NLG (Novikova et al. 2017): restaurant descriptions from attribute-value pairs.

Reads the original release's CSV (columns `mr`, `ref`; only `mr` in the test set without references), JSON lines
`{"mr": ..., "references": [...]}`, and the hub's sets, also exported to such files (`meaning_representation` with
`human_reference`, or with `target` and `references`). Equal meaning representations become one example, in order of
first appearance, with their references in order (repeated ones are kept).

References keep their words and case; only outer white space is removed, and an inner line break becomes one space,
because generation for this task bans line breaks. In the data that the authors of prefix-tuning released, texts are
also tokenized (`city centre .`); this reader keeps the original spelling, which BLEU's tokenizer expects.
"""

from __future__ import annotations

import re
from pathlib import Path

from prefixtune.data.examples import Example
from prefixtune.data.files import Record, one_line, read_file
from prefixtune.data.tasks.formats import task_format
from prefixtune.errors import DataError, did_you_mean

__all__ = ["ATTRIBUTES", "E2E_FORMATS", "linearize", "parse_mr", "read_e2e"]


#: The eight attributes of E2E -> their names in the linearization (the authors': four are renamed).
ATTRIBUTES = {
    "name": "name",
    "eatType": "Type",
    "food": "food",
    "priceRange": "price",
    "customer rating": "customer rating",
    "area": "area",
    "familyFriendly": "family friendly",
    "near": "near",
}
E2E_FORMATS = (".csv", ".jsonl")
_PAIR = re.compile(r"([^\[\],]*)\[([^\[\]]*)\]\s*")
_SHAPE = "write it as name[Blue Spice], eatType[pub], area[riverside]."


def parse_mr(mr: str) -> dict[str, str]:
    """The attributes of a meaning representation, in its order.

    >>> parse_mr("name[Blue Spice], eatType[coffee shop]")
    {'name': 'Blue Spice', 'eatType': 'coffee shop'}

    Raises:
        DataError: The text is malformed, or an attribute is unknown, empty or given twice.
    """
    values: dict[str, str] = {}
    position = 0
    while True:
        pair = _PAIR.match(mr, position)
        if pair is None:
            raise DataError(f"meaning representation {mr!r} is malformed from {mr[position:]!r} on.", hint=_SHAPE)
        attribute, value = pair[1].strip(), pair[2].strip()
        if attribute not in ATTRIBUTES:
            raise DataError(
                f"meaning representation {mr!r} has the unknown attribute {attribute!r}.",
                hint=did_you_mean(attribute, ATTRIBUTES),
            )
        if not value or attribute in values:
            fault = "given twice" if attribute in values else "empty"
            raise DataError(
                f"meaning representation {mr!r}: {attribute!r} is {fault}; each attribute has one value.",
                hint="keep one value, or leave the attribute out.",
            )
        values[attribute] = value
        position = pair.end()
        if position == len(mr):
            return values
        if mr[position] != ",":
            raise DataError(f"meaning representation {mr!r} lacks a comma before {mr[position:]!r}.", hint=_SHAPE)
        position += 1


def linearize(mr: str) -> str:
    """A meaning representation as the model reads it (the authors' linearization; the order is kept).

    >>> linearize("name[The Vaults], eatType[pub], priceRange[more than £30], familyFriendly[yes]")
    'name : The Vaults | Type : pub | price : more than £30 | family friendly : yes'

    Raises:
        DataError: As `parse_mr`.
    """
    return " | ".join(f"{ATTRIBUTES[attribute]} : {value}" for attribute, value in parse_mr(mr).items())


def read_e2e(path: Path) -> list[Example]:
    """Read an E2E file (`.csv` or `.jsonl`, each also `.gz`), or a set of the `datasets` library.

    Args:
        path: The file. Column names may be in either case, or those of the hub's sets; other columns are ignored.

    Returns:
        One example for each distinct meaning representation; `fields` is `{"mr": the original text}`, and the group
        `attributes` is the number of its attributes; no targets if the file has no references.

    Raises:
        DataError: The file or one of its rows is wrong; the message names file and line.
    """
    path = Path(path)
    records, form = read_file(path, E2E_FORMATS), task_format(path, E2E_FORMATS, ".csv")
    records = [_from_hub(record, form) for record in records]
    wanted = "ref" if form == ".csv" else "references"
    sources: dict[str, str] = {}
    targets: dict[str, list[str]] = {}
    for record in records:
        mr, references = _read_row(record, wanted)
        if mr not in sources:
            try:
                sources[mr] = linearize(mr)
            except DataError as error:
                raise DataError(f"{record.location}: {error.message}", hint=error.hint) from error
        targets.setdefault(mr, []).extend(references)
    return [
        Example(source, tuple(targets[mr]), {"mr": mr}, {"attributes": str(len(parse_mr(mr)))})
        for mr, source in sources.items()
    ]


def _from_hub(record: Record, form: str) -> Record:
    """A record with the column names of this module's files instead of those of the hub's sets."""
    values = dict(record.values)
    for name, own in (("meaning_representation", "mr"), ("human_reference", "ref")):
        if name in values and own not in values:
            values[own] = values.pop(name)
    if form == ".csv":
        return Record(record.location, values)
    # GEM's training rows have an empty list of references and one target.
    single = next((name for name in ("ref", "target") if name in values), None)
    if single is not None and not values.get("references"):
        values["references"] = [values.pop(single)]
    if not form:
        # A set has columns of its own, such as ids, also where it has no references.
        values = {name: values[name] for name in ("mr", "references") if values.get(name) not in (None, [])} or values
    return Record(record.location, values)


def _read_row(record: Record, wanted: str) -> tuple[str, list[str]]:
    """The meaning representation and the cleaned references of one record."""
    values = {name.lower(): value for name, value in record.values.items()}
    # A file may have no references at all; but a second column with another name is a mistake, not a test set.
    for column in ("mr", wanted):
        if column not in values and (column == "mr" or len(values) > 1):
            raise DataError(
                f"{record.location}: no column {column!r}; needed: 'mr' and {wanted!r} ('mr' alone for generation).",
                hint=did_you_mean(column, record.values),
            )
    mr = values["mr"]
    if not isinstance(mr, str):
        raise DataError(f"{record.location}: 'mr' is {mr!r}; a string is needed.", hint=_SHAPE)
    if wanted not in values:
        return mr.strip(), []
    references = [values[wanted]] if wanted == "ref" else values[wanted]
    if not isinstance(references, list) or not references:
        raise DataError(
            f"{record.location}: {wanted!r} is {references!r}; a list of at least one string is needed.",
            hint=f'write "{wanted}": ["..."], or leave it out of every row.',
        )
    return mr.strip(), [one_line(reference, wanted, record.location) for reference in references]
