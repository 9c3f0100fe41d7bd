"""A small tagging set made here: passengers' messages to a night-train office, with four kinds of span.

`TRAIN` (Grey Wolf), `STATION` (Port Alder), `TIME` (18:45, quarter to seven) and `COACH` (coach 7, car B). Several
words are inside a span in one place and outside in another, so that a list of words cannot tag them: stations named
after trains (Heron Bridge), animals that are not trains, numbers of people, crowns and hours, a coach without a number.
Some spans follow each other directly, of different types (the 18:45 Grey Wolf) and of the same (the Northgate Westport
sleeper). In a few places the next word decides (the Heron left, the Heron Bridge Westport sleeper), which a model that
tags from left to right cannot know.

Tokens are words and punctuation marks.
"""

from __future__ import annotations

from prefixtune.data.examples import Example
from prefixtune.data.tasks.tagging import tagged
from prefixtune.data.toy.sampler import BalancedSampler

#: Type -> its spans, tokens separated by spaces.
SPANS: dict[str, tuple[str, ...]] = {
    "TRAIN": ("Heron", "Otter", "Night Owl", "White Hare", "Fox", "Evening Swan", "Badger", "Grey Wolf"),
    "STATION": (
        *("Northgate", "Oldbridge", "Port Alder", "Heron Bridge", "Saltmarsh", "Saltmarsh East", "Wolf Halt"),
        *("Seven Elms", "Westport", "Fox Green"),
    ),
    "TIME": (
        *("18:45", "20:30", "21:10", "22:05", "half past nine", "quarter to seven", "ten o'clock", "midnight"),
        *("five to eight", "twenty past ten"),
    ),
    "COACH": ("coach 7", "coach 12", "coach 4", "car B", "car D", "sleeping car 3", "sleeping car 9"),
}
#: The sentences; a word in capitals is replaced by a span of that type.
_SENTENCES = (
    "Does the TRAIN stop at STATION before TIME ?",
    "We are seven in all and booked COACH on the TRAIN .",
    "My umbrella is still in COACH of the TIME TRAIN .",
    "The STATION STATION sleeper was ten minutes late again .",
    "At TIME nobody at STATION knew where the TRAIN was .",
    "Please move the two of us from COACH to COACH .",
    "I paid 30 crowns and the coach was cold .",
    "A fox crossed the line near STATION , so we came in at TIME .",
    "Is the TRAIN , COACH , open from TIME on ?",
    "From STATION to STATION the TRAIN takes eight hours .",
    "The heron painted on COACH is lovely .",
    "TRAIN , TIME , COACH : two beds , please .",
    "Wake me at TIME , half an hour before STATION .",
    "No porter met us at STATION this time .",
    "Seven of us will board the TRAIN at STATION .",
    "The TRAIN left without us , and the next car was full .",
    "Ten past the hour is no answer : when does the TRAIN leave STATION ?",
    "Badger and otter were on the menu in COACH , or so we read it .",
)
_MIN_TRAIN = 100


def make_toy_tags(seed: int = 7, train: int = 300, held_out: int = 60) -> tuple[list[Example], list[Example]]:
    """The training messages and the held-out ones, of one or two sentences.

    No message is in both, none is repeated, and every sentence and span of a held-out message occurs in training.

    >>> message = make_toy_tags()[0][0]
    >>> print(message.source)
    My umbrella is still in car D of the 20:30 Heron .
    >>> print(message.targets[0])
    O O O O O B-COACH I-COACH O O B-TIME B-TRAIN O

    Args:
        seed: Another seed gives other messages by the same rules; >= 0.
        train: Number of training messages; 100 to 10,000.
        held_out: Number of held-out messages; 0 to 10,000.
    """
    sampler = BalancedSampler(seed)
    messages: dict[str, Example] = {}
    while len(messages) < train + held_out:
        tokens: list[str] = []
        tags: list[str] = []
        last: dict[str, str] = {}
        for _ in range(sampler.draw("sentences", (1, 2))):
            for word in sampler.draw("sentence", _SENTENCES).split():
                span = _span(sampler, word, last).split() if word in SPANS else [word]
                tokens += span
                tags += [f"B-{word}", *[f"I-{word}"] * (len(span) - 1)] if word in SPANS else ["O"]
        example = tagged(tokens, tags)
        messages.setdefault(example.source, example)
    examples = list(messages.values())
    return examples[:train], examples[train:]


def _span(sampler: BalancedSampler, kind: str, last: dict[str, str]) -> str:
    """The next span of a type, different from the message's last span of that type."""
    span = sampler.draw(kind, SPANS[kind])
    if span == last.get(kind):
        span = sampler.draw(kind, SPANS[kind])
    last[kind] = span
    return span
