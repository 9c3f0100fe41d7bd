"""A small classification set made here: passengers' messages to a night-train office, and the department of each.

The rule: what the writer asks for decides. Half of the messages name two subjects: one that is asked about and one that
is only mentioned (settled, praised or complained about), in either order and with the same phrases for all subjects. If
nothing is asked, the only subject decides. So each pair of subjects goes to one department or the other with the same
words, and no list of keywords sorts them all. Every message ends with the train and a place, in which "berth" and
"ticket" say nothing about the subject.
"""

from __future__ import annotations

from prefixtune.data.examples import Example
from prefixtune.data.toy.sampler import BalancedSampler

#: Department -> its subjects, as they are written in a message.
DEPARTMENTS: dict[str, tuple[str, ...]] = {
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
#: How a writer asks for something; a subject follows.
REQUESTS = (
    "please write back about",
    "somebody should look into",
    "kindly let me know about",
    "my question is about",
    "I need help with",
    "what I want settled is",
    "I would like to hear more about",
    "I must ask you about",
)
#: How a writer mentions something without asking; a subject follows.
MENTIONS = (
    "I have no complaint about",
    "there is no need to write back about",
    "your colleague has already looked into",
    "I have no question about",
    "please forget what I asked about",
    "I was pleased with",
    "I was not happy with",
    "there was some trouble over",
    "last week I had to ask about",
)
_MENTION_FIRST = (". ", ", but ", "; this time ")
_REQUEST_FIRST = (". ", "; by the way, ", ", and ")
_GREETINGS = ("Good evening", "Dear night office", "Hello", "To whom it may concern")
_TRAINS = ("Heron", "Otter", "Badger", "Swan", "Fox", "Owl", "Hare", "Wolf")
_PLACES = ("berth", "ticket", "coach")
_NUMBERS = tuple(str(number) for number in range(1, 13))
_PAIRS = tuple((one, other) for one in DEPARTMENTS for other in DEPARTMENTS if one != other)
_MIN_TRAIN = 100


def make_toy_labels(seed: int = 7, train: int = 400, held_out: int = 100) -> tuple[list[Example], list[Example]]:
    """The training messages and the held-out ones.

    No message is in both, none is repeated, and every subject and phrase of a held-out message occurs in training.
    The five labels are about equally frequent. An example's `fields` has `text`, `label` and `mentioned`: the
    department of the second subject, which is not asked about, or nothing.

    >>> message = make_toy_labels()[0][13]
    >>> message.source
    'Hello, I was not happy with the unused voucher. I need help with my lost umbrella. Heron, ticket 10.'
    >>> message.targets, message.fields["mentioned"]
    (('luggage',), 'tickets')

    Args:
        seed: Another seed gives other messages by the same rules; >= 0.
        train: Number of training messages; 100 to 10,000.
        held_out: Number of held-out messages; 0 to 10,000.
    """
    sampler = BalancedSampler(seed)
    messages: dict[str, Example] = {}
    while len(messages) < train + held_out:
        example = _two_subjects(sampler) if sampler.draw("subjects", (False, True)) else _one_subject(sampler)
        messages.setdefault(example.source, example)
    examples = list(messages.values())
    return examples[:train], examples[train:]


def _one_subject(sampler: BalancedSampler) -> Example:
    label = sampler.draw("department", tuple(DEPARTMENTS))
    asks = sampler.draw("asks", (False, True))
    return _message(sampler, (_request if asks else _mention)(sampler, label), label, "")


def _two_subjects(sampler: BalancedSampler) -> Example:
    label, mentioned = sampler.draw("pair", _PAIRS)
    request, mention = _request(sampler, label), _mention(sampler, mentioned)
    if sampler.draw("request first", (False, True)):
        body = request + sampler.draw("after a request", _REQUEST_FIRST) + mention
    else:
        body = mention + sampler.draw("after a mention", _MENTION_FIRST) + request
    return _message(sampler, body, label, mentioned)


def _request(sampler: BalancedSampler, department: str) -> str:
    subject = sampler.draw(f"asked: {department}", DEPARTMENTS[department])
    return f"{sampler.draw('request', REQUESTS)} {subject}"


def _mention(sampler: BalancedSampler, department: str) -> str:
    subject = sampler.draw(f"mentioned: {department}", DEPARTMENTS[department])
    return f"{sampler.draw('mention', MENTIONS)} {subject}"


def _message(sampler: BalancedSampler, body: str, label: str, mentioned: str) -> Example:
    first, _, second = body.partition(". ")
    body = f"{first}. {second[0].upper()}{second[1:]}" if second else body
    place, number = sampler.draw("place", _PLACES), sampler.draw("number", _NUMBERS)
    train = sampler.draw("train", _TRAINS)
    text = f"{sampler.draw('greeting', _GREETINGS)}, {body}. {train}, {place} {number}."
    return Example(text, (label,), {"text": text, "label": label, "mentioned": mentioned})
