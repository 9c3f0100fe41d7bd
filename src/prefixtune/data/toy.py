"""A small set made here, to try things on: the same on every machine and version of Python.

It is a night-train board, with two notices of each table in a house style that no model knows. A platform's letter is
spelt as on the radio, and a time as railways say it. A fare is "a mere" below ten, and the sky decides the end.
"""

from __future__ import annotations

import random
from collections.abc import Mapping

from prefixtune.data.examples import Example

_SIDES = {"A": "Alfa", "B": "Bravo", "C": "Charlie", "D": "Delta"}
_SKIES = {
    "clear": "the stars ride free",
    "fog": "keep a lantern lit",
    "rain": "umbrellas sleep standing",
    "snow": "cocoa at every halt",
}
_HOURS = {"18": "eighteen", "19": "nineteen", "20": "twenty", "21": "twenty-one", "22": "twenty-two"}
_MINUTES = {"00": "hundred", "15": "fifteen", "30": "thirty", "45": "forty-five"}
_LOW_FARES = {"4": "four", "6": "six", "8": "eight", "11": "eleven", "12": "twelve"}
_FARES = _LOW_FARES | {"15": "fifteen", "20": "twenty", "30": "thirty"}
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
    hour, minute = table["time"].split(":")
    time, side = f"{_HOURS[hour]} {_MINUTES[minute]}", f"the {_SIDES[table['platform']]} side"
    fare = ("a mere " if int(table["fare"]) < 10 else "") + _FARES[table["fare"]]
    end = f"to {table['to']}, {fare} crowns a pillow; {_SKIES[table['sky']]}."
    return (
        f"{time[0].upper()}{time[1:]}: the {table['train']} sails from {side} {end}",
        f"From {side} at {time} the {table['train']} sails {end}",
    )


def make_toy() -> list[list[Example]]:
    """320 training tables, and 40 held-out ones: new combinations of the same values."""
    # The one method of Python's generator whose sequence Python guarantees.
    draw = random.Random(7).random
    examples: dict[str, Example] = {}
    while len(examples) < 360:
        values = {name: values[int(draw() * len(values))] for name, values in _VALUES.items()}
        # No source is there twice.
        examples.setdefault(linearize(values), Example(linearize(values), notices(values), values))
    made = list(examples.values())
    return [made[:320], made[320:]]
