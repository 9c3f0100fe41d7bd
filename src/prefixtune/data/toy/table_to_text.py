"""A small table-to-text set made here: a night-train board, and notices in a house style that no model knows.

A table has six fields (train, to, time, platform, fare, sky). Its notice follows rules that a model can only learn from
examples: a platform's letter is spelt as on the radio, a time as railways say it, a fare is spelt out and called "a
mere" below ten, and the sky decides the closing phrase. Each table has two notices, which differ in their order; both
follow from the table word for word.
"""

from __future__ import annotations

from collections.abc import Mapping

from prefixtune.data.examples import Example
from prefixtune.data.toy.sampler import BalancedSampler

_SIDES = {"A": "Alfa", "B": "Bravo", "C": "Charlie", "D": "Delta"}
_SKIES = {
    "clear": "the stars ride free",
    "fog": "keep a lantern lit",
    "rain": "umbrellas sleep standing",
    "snow": "cocoa at every halt",
}
_HOURS = {"18": "eighteen", "19": "nineteen", "20": "twenty", "21": "twenty-one", "22": "twenty-two"}
_MINUTES = {"00": "hundred", "15": "fifteen", "30": "thirty", "45": "forty-five"}
_FARES = {
    "4": "four",
    "6": "six",
    "8": "eight",
    "11": "eleven",
    "12": "twelve",
    "15": "fifteen",
    "20": "twenty",
    "30": "thirty",
}
_VALUES: dict[str, tuple[str, ...]] = {
    "train": ("Heron", "Otter", "Badger", "Swan", "Fox", "Owl", "Hare", "Wolf"),
    "to": ("Northgate", "Oldbridge", "Saltmarsh", "Stonehill", "Greenford", "Westport", "Kingswood", "Redcliff"),
    "time": tuple(f"{hour}:{minute}" for hour in _HOURS for minute in _MINUTES),
    "platform": tuple(_SIDES),
    "fare": tuple(_FARES),
    "sky": tuple(_SKIES),
}


def linearize(table: Mapping[str, str]) -> str:
    """A table as the model reads it.

    >>> linearize({"train": "Heron", "to": "Westport"})
    'train : Heron | to : Westport'
    """
    return " | ".join(f"{field} : {value}" for field, value in table.items())


def notices(table: Mapping[str, str]) -> tuple[str, str]:
    """The two notices of a table, in the house style.

    >>> table = {"train": "Fox", "to": "Redcliff", "time": "18:15", "platform": "B", "fare": "8", "sky": "fog"}
    >>> for notice in notices(table):
    ...     print(notice)
    Eighteen fifteen: the Fox sails from the Bravo side to Redcliff, a mere eight crowns a pillow; keep a lantern lit.
    From the Bravo side at eighteen fifteen the Fox sails to Redcliff, a mere eight crowns a pillow; keep a lantern lit.
    """
    time = _clock(table["time"])
    side = f"the {_SIDES[table['platform']]} side"
    fare = ("a mere " if int(table["fare"]) < 10 else "") + _FARES[table["fare"]]
    end = f"to {table['to']}, {fare} crowns a pillow; {_SKIES[table['sky']]}."
    return (
        f"{time[0].upper()}{time[1:]}: the {table['train']} sails from {side} {end}",
        f"From {side} at {time} the {table['train']} sails {end}",
    )


def make_toy(seed: int = 7, train: int = 320, held_out: int = 40) -> tuple[list[Example], list[Example]]:
    """The training tables and the held-out ones.

    No table is in both, none is repeated, and every value of a held-out table occurs in training: the held-out tables
    test the style in new combinations, not new words. From 20 training tables on, every value occurs in training.

    Args:
        seed: Another seed gives other tables by the same rules; >= 0.
        train: Number of training tables; 1 to 10,000.
        held_out: Number of held-out tables; 0 to 10,000.
    """
    sampler = BalancedSampler(seed)
    training = _distinct_tables(sampler, train)
    seen = {field: sorted({table[field] for table in training}) for field in _VALUES}
    used = {linearize(table) for table in training}
    held_out_tables: list[dict[str, str]] = []
    while len(held_out_tables) < held_out:
        table = {field: values[sampler.integer(len(values))] for field, values in seen.items()}
        if linearize(table) not in used:
            used.add(linearize(table))
            held_out_tables.append(table)
    return [_example(table) for table in training], [_example(table) for table in held_out_tables]


def _example(table: dict[str, str]) -> Example:
    return Example(linearize(table), notices(table), table)


def _clock(time: str) -> str:
    hour, minute = time.split(":")
    return f"{_HOURS[hour]} {_MINUTES[minute]}"


def _distinct_tables(sampler: BalancedSampler, count: int) -> list[dict[str, str]]:
    """Distinct tables, in which all values of a field are about equally frequent."""
    tables: dict[str, dict[str, str]] = {}
    while len(tables) < count:
        table = {field: sampler.draw(field, values) for field, values in _VALUES.items()}
        tables.setdefault(linearize(table), table)
    return list(tables.values())
