"""A small classification set made here: passengers' messages to a night-train office, and the department of each.

The house rule: what the writer asks for decides. Half of the messages name two subjects, one that is asked about and
one that is only mentioned (settled, praised or complained of), in either order and with the same phrases whatever the
subjects; where nothing is asked, the only subject decides. So each pair of subjects goes to one department or the
other with the same words, and no list of keywords sorts them all. Every message closes with the train and a place,
where "berth" and "ticket" say nothing of the subject.

The same arguments give the same set on every version of Python.

Knows nothing of tokenizers or training, and reads no file.
"""

from __future__ import annotations

from prefixtune.data.examples import Example
from prefixtune.data.toy.sampler import BalancedSampler, check_sizes

__all__ = ["DEPARTMENTS", "MENTIONS", "REQUESTS", "make_toy_labels"]


#: Department -> its subjects, as they stand in a message.
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
_LEAST = 100


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
        seed: Another seed gives other messages, by the same rules; >= 0.
        train: Number of training messages; 100 to 10,000.
        held_out: Number of held-out messages; 0 to 10,000.

    Raises:
        ConfigError: A number is out of range.
    """
    hint = "leave the numbers out to have 400 and 100 messages."
    check_sizes("toy_labels", seed, train, held_out, least=_LEAST, hint=hint)
    dealer = BalancedSampler(seed)
    made: dict[str, Example] = {}
    while len(made) < train + held_out:
        example = _two_subjects(dealer) if dealer.deal("subjects", (False, True)) else _one_subject(dealer)
        made.setdefault(example.source, example)
    examples = list(made.values())
    return examples[:train], examples[train:]


def _one_subject(dealer: BalancedSampler) -> Example:
    label = dealer.deal("department", tuple(DEPARTMENTS))
    asks = dealer.deal("asks", (False, True))
    return _message(dealer, (_request if asks else _mention)(dealer, label), label, "")


def _two_subjects(dealer: BalancedSampler) -> Example:
    label, mentioned = dealer.deal("pair", _PAIRS)
    request, mention = _request(dealer, label), _mention(dealer, mentioned)
    if dealer.deal("request first", (False, True)):
        body = request + dealer.deal("after a request", _REQUEST_FIRST) + mention
    else:
        body = mention + dealer.deal("after a mention", _MENTION_FIRST) + request
    return _message(dealer, body, label, mentioned)


def _request(dealer: BalancedSampler, department: str) -> str:
    subject = dealer.deal(f"asked: {department}", DEPARTMENTS[department])
    return f"{dealer.deal('request', REQUESTS)} {subject}"


def _mention(dealer: BalancedSampler, department: str) -> str:
    subject = dealer.deal(f"mentioned: {department}", DEPARTMENTS[department])
    return f"{dealer.deal('mention', MENTIONS)} {subject}"


def _message(dealer: BalancedSampler, body: str, label: str, mentioned: str) -> Example:
    first, _, second = body.partition(". ")
    body = f"{first}. {second[0].upper()}{second[1:]}" if second else body
    place, number = dealer.deal("place", _PLACES), dealer.deal("number", _NUMBERS)
    train = dealer.deal("train", _TRAINS)
    text = f"{dealer.deal('greeting', _GREETINGS)}, {body}. {train}, {place} {number}."
    return Example(text, (label,), {"text": text, "label": label, "mentioned": mentioned})
