"""E2E NLG (Novikova et al. 2017): restaurant descriptions from attribute-value pairs.

Rows are those of the original release's CSV (columns `mr`, `ref`; only `mr` in the test set without references), of
JSON lines `{"mr": ..., "references": [...]}`, or of the hub's sets (`meaning_representation` with `human_reference`, or
with `target` and `references`). Names of columns may be in either case. Equal meaning representations are merged, in
order of first appearance, with their references in order (repeated ones are kept).

References keep their words and case; only outer white space is removed, and an inner line break becomes one space,
because generation for this task bans line breaks. In the data that the authors of prefix-tuning released, texts are
also tokenized (`city centre .`); this reader keeps the original spelling, which BLEU's tokenizer expects.
"""

from __future__ import annotations

import re

from prefixtune.data.examples import Example
from prefixtune.data.files import Record, one_line, wrong_value
from prefixtune.errors import DataError, did_you_mean, short_repr

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
_REFERENCES = ("references", "ref", "human_reference", "target")
"""Columns of texts: the first that is filled."""
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
            raise DataError(
                f"meaning representation {short_repr(mr)} is malformed from {short_repr(mr[position:])} on; each "
                "attribute has one value.",
                hint="write it as name[Blue Spice], eatType[pub], area[riverside].",
            )
        if attribute not in ATTRIBUTES:
            raise DataError(
                f"meaning representation {short_repr(mr)} has the unknown attribute {short_repr(attribute)}.",
                hint=did_you_mean(attribute, ATTRIBUTES),
            )
        values[attribute] = value
        position = pair.end()
    return values


def linearize(mr: str) -> str:
    """A meaning representation as the model reads it (the authors' linearization; the order is kept).

    >>> linearize("name[The Vaults], eatType[pub], priceRange[more than £30], familyFriendly[yes]")
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
    values = {name.lower(): value for name, value in record.values.items()}
    mr = values.get("mr", values.get("meaning_representation"))
    if not isinstance(mr, str):
        raise wrong_value(record.location, "mr", mr, "text")
    mr = mr.strip()
    try:
        source, groups = linearize(mr), {"attributes": str(len(parse_mr(mr)))}
    except DataError as error:
        raise DataError(f"{record.location}: {error.message}", hint=error.hint) from error
    present = [name for name in _REFERENCES if name in values]
    if not present:
        return Example(source, (), {"mr": mr}, groups)
    # GEM's training rows have an empty list of references and one target.
    column = next((name for name in present if values[name] not in (None, [])), present[0])
    texts = values[column] if isinstance(values[column], list) and values[column] else [values[column]]
    return Example(source, [one_line(text, column, record.location) for text in texts], {"mr": mr}, groups)
