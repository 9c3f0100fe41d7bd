"""Three small tasks made here, to see what a prefix can express: two that it should find hard, one easy one.

A prefix cannot change how a model's positions attend relative to each other (Petrov et al. 2024): it elicits what the
model can do. Hard are tasks that need something new: `mapping` (letters replaced by a rule) and `base` (sums in base
7). Easy is `copy`. Each source has one correct answer.
"""

from __future__ import annotations

from collections.abc import Callable

from prefixtune.data.examples import Example
from prefixtune.data.toy.sampler import BalancedSampler
from prefixtune.errors import ConfigError, did_you_mean

_WORDS = (
    *("lamp", "river", "stone", "fox", "coat", "train", "bread", "window", "letter", "garden", "owl", "table"),
    *("bridge", "cloud", "button", "horse", "apple", "candle", "winter", "market", "piano", "ladder", "forest"),
    *("pillow", "engine", "island", "feather", "kettle", "mirror", "harbour"),
)
_LETTERS = tuple("abcdefghijkl")
_NEW_LETTERS = dict(zip(_LETTERS, "hdkalgibjcef", strict=True))
_BASE = 7


def _words(sampler: BalancedSampler) -> list[str]:
    return [sampler.draw("word", _WORDS) for _ in range(sampler.draw("length", (3, 4, 5)))]


def _mapping(sampler: BalancedSampler) -> tuple[str, str]:
    letters = [sampler.draw("letter", _LETTERS) for _ in range(sampler.draw("length", (4, 5, 6)))]
    return " ".join(letters), " ".join(_NEW_LETTERS[letter] for letter in letters)


def _base(sampler: BalancedSampler) -> tuple[str, str]:
    one, other = (1 + sampler.integer(_BASE**2 * 4 - 1) for _ in range(2))
    return f"{_in_base(one)} + {_in_base(other)}", _in_base(one + other)


def _in_base(number: int) -> str:
    digits = ""
    while number:
        number, digit = divmod(number, _BASE)
        digits = f"{digit}{digits}"
    return digits or "0"


def _copy(sampler: BalancedSampler) -> tuple[str, str]:
    text = " ".join(_words(sampler))
    return text, text


SKILLS: dict[str, Callable[[BalancedSampler], tuple[str, str]]] = {
    "mapping": _mapping,
    "base": _base,
    "copy": _copy,
}


def make_skill(
    name: str, seed: int = 7, train: int = 320, dev: int = 80, held_out: int = 100
) -> tuple[list[Example], list[Example], list[Example]]:
    """Examples of one task: to train on, to choose by, and held-out ones.

    No source is in two parts, and none is repeated. The rule of which letter stands for which is
    the same for every seed.

    >>> example = make_skill("copy")[0][0]
    >>> example.targets == (example.source,)
    True

    Args:
        name: One of `SKILLS`.
        seed: Another seed gives other examples by the same rules; >= 0.
        train: Number of training examples; 1 to 10,000.
        dev: Number of examples to choose by; 0 to 10,000.
        held_out: Number of held-out examples; 0 to 10,000.

    Raises:
        ConfigError: The name is unknown, a number is out of range, or there are fewer different sources.
    """
    if name not in SKILLS:
        raise ConfigError(f"there is no toy task {name!r}.", hint=did_you_mean(name, SKILLS))
    sampler, wanted = BalancedSampler(seed), train + dev + held_out
    examples: dict[str, Example] = {}
    for _ in range(100 * wanted):
        source, target = SKILLS[name](sampler)
        examples.setdefault(source, Example(source, (target,)))
        if len(examples) == wanted:
            break
    else:
        raise ConfigError(
            f"toy_{name} set: {wanted} examples were requested, but only {len(examples)} different ones were found.",
            hint="make fewer.",
        )
    rows = list(examples.values())
    return rows[:train], rows[train : train + dev], rows[train + dev :]
