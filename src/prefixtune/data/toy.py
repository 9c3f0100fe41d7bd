"""Small sets made here, to try things on: they are the same on every machine and version of Python.

- `toy`: a night-train board, and two notices of each table in a house style that no model knows: a platform's letter
  is spelt as on the radio, a time as railways say it, a fare is "a mere" below ten, and the sky decides the end.
- `toy_labels`: passengers' messages, and the department that each is for. What the writer asks for decides, not what is
  only mentioned; both come with the same words, so that no list of keywords sorts them all.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TypeVar

from prefixtune.data.examples import Example

_Value = TypeVar("_Value")


class _Sampler:
    """Draws values from named lists: each list is shuffled, used up, and shuffled again.

    So all values of a list are about equally frequent. Of Python's generator only `random` is used, the one method
    whose sequence Python guarantees.
    """

    def __init__(self) -> None:
        self._rng = random.Random(7)
        self._remaining: dict[str, list[int]] = {}

    def integer(self, limit: int) -> int:
        """An integer from 0 to `limit` - 1."""
        return int(self._rng.random() * limit)

    def draw(self, name: str, values: Sequence[_Value]) -> _Value:
        """The next value of a list, which is the same at each call of its name."""
        remaining = self._remaining.get(name)
        if not remaining:
            remaining = self._remaining[name] = list(range(len(values)))
            for last in range(len(remaining) - 1, 0, -1):
                other = self.integer(last + 1)
                remaining[last], remaining[other] = remaining[other], remaining[last]
        return values[remaining.pop()]


def _divide(make: Callable[[_Sampler], Example], *sizes: int) -> list[list[Example]]:
    """Sets of these sizes; no source is in two of them, and none is repeated."""
    sampler, examples = _Sampler(), dict[str, Example]()
    while len(examples) < sum(sizes):
        example = make(sampler)
        examples.setdefault(example.source, example)
    left = iter(examples.values())
    return [[next(left) for _ in range(size)] for size in sizes]


# --- a board and its notices -----------------------------------------------------------------------------------------

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
_TRAINS = ("Heron", "Otter", "Badger", "Swan", "Fox", "Owl", "Hare", "Wolf")
_VALUES: dict[str, tuple[str, ...]] = {
    "train": _TRAINS,
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
    drawn = 0

    def table(sampler: _Sampler) -> Example:
        nonlocal drawn
        drawn += 1
        is_training = drawn <= 320
        values = {
            name: sampler.draw(name, values) if is_training else sorted(values)[sampler.integer(len(values))]
            for name, values in _VALUES.items()
        }
        return Example(linearize(values), notices(values), values)

    return _divide(table, 320, 40)


# --- messages and their departments ----------------------------------------------------------------------------------

_DEPARTMENTS: dict[str, tuple[str, ...]] = {
    "bedding": (
        *("the upper berth", "my second pillow", "the thin blankets", "the linen sheets", "the ladder to the bunk"),
        "the draught by the bunk",
    ),
    "kitchen": (
        *("the breakfast tray", "the onion soup", "supper for three", "the midnight cocoa", "the dining car bill"),
        "our table in the dining car",
    ),
    "luggage": (
        *("my brown suitcase", "the hat box", "our two trunks", "the bicycle in the van", "my lost umbrella"),
        "the cello case",
    ),
    "tickets": (
        *("my return ticket", "the fare for two", "the family discount", "my refund", "the unused voucher"),
        "our seat reservation",
    ),
    "timetable": (
        *("the connection at Oldbridge", "the late arrival", "the Sunday departures", "the winter timetable"),
        *("the hour of arrival", "the stop at Saltmarsh"),
    ),
}
_REQUESTS = (
    *("please write back about", "somebody should look into", "kindly let me know about", "my question is about"),
    *("I need help with", "what I want settled is", "I would like to hear more about", "I must ask you about"),
)
_MENTIONS = (
    *("I have no complaint about", "there is no need to write back about", "your colleague has already looked into"),
    *("I have no question about", "please forget what I asked about", "I was pleased with", "I was not happy with"),
    *("there was some trouble over", "last week I had to ask about"),
)
_MENTION_FIRST = (". ", ", but ", "; this time ")
_REQUEST_FIRST = (". ", "; by the way, ", ", and ")
_GREETINGS = ("Good evening", "Dear night office", "Hello", "To whom it may concern")
_PLACES = ("berth", "ticket", "coach")
_NUMBERS = tuple(str(number) for number in range(1, 13))
_PAIRS = tuple((one, other) for one in _DEPARTMENTS for other in _DEPARTMENTS if one != other)


def _message(sampler: _Sampler) -> Example:
    """A message: one subject that is asked about or mentioned, or one that is asked about and another mentioned."""
    mentioned = ""
    if sampler.draw("subjects", (False, True)):
        label, mentioned = sampler.draw("pair", _PAIRS)
        request, mention = _request(sampler, label), _mention(sampler, mentioned)
        if sampler.draw("request first", (False, True)):
            body = request + sampler.draw("after a request", _REQUEST_FIRST) + mention
        else:
            body = mention + sampler.draw("after a mention", _MENTION_FIRST) + request
    else:
        label = sampler.draw("department", tuple(_DEPARTMENTS))
        body = (_request if sampler.draw("asks", (False, True)) else _mention)(sampler, label)
    first, _, second = body.partition(". ")
    body = f"{first}. {second[0].upper()}{second[1:]}" if second else body
    place, number = sampler.draw("place", _PLACES), sampler.draw("number", _NUMBERS)
    train = sampler.draw("train", _TRAINS)
    text = f"{sampler.draw('greeting', _GREETINGS)}, {body}. {train}, {place} {number}."
    return Example(text, (label,), {"text": text, "label": label, "mentioned": mentioned})


def _request(sampler: _Sampler, department: str) -> str:
    subject = sampler.draw(f"asked: {department}", _DEPARTMENTS[department])
    return f"{sampler.draw('request', _REQUESTS)} {subject}"


def _mention(sampler: _Sampler, department: str) -> str:
    subject = sampler.draw(f"mentioned: {department}", _DEPARTMENTS[department])
    return f"{sampler.draw('mention', _MENTIONS)} {subject}"


TOYS: dict[str, Callable[[], list[list[Example]]]] = {
    "toy": make_toy,
    "toy_labels": partial(_divide, _message, 400, 100),
}
"""Task -> its sets."""
