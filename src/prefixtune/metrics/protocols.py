"""The tasks' official ways of preparing texts before they are counted, and the metrics that they report.

A protocol knows normalization and conventions about references. It knows nothing of files, and computes no score.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

from prefixtune.metrics.base import Unavailable

__all__ = ["PROTOCOLS", "Protocol", "squeeze"]

# The dot is what a small "İ" leaves behind its i: texts that were prepared before, as DART's references are, stay so.
_NON_WORD = re.compile(r"((?!(?<=i)\u0307)\W)")


def squeeze(text: str) -> str:
    r"""A text on one line: every run of white space, line and paragraph separators among it, becomes one space.

    >>> squeeze(" a\tb\u2028c\n")
    'a b c'
    """
    return " ".join(text.split())


def _split_words(text: str) -> str:
    """Set off every character that is no letter, digit or underscore, and then write small (WebNLG's script)."""
    return squeeze(_NON_WORD.sub(r" \1 ", text).lower())


def _split_ascii_words(text: str) -> str:
    try:
        from unidecode import unidecode
    except ImportError as error:
        raise Unavailable(
            "unidecode is not installed, and WebNLG's normalization needs it", "pip install 'prefixtune[scores]'"
        ) from error
    return _split_words(unidecode(text))


@dataclass(frozen=True)
class Protocol:
    """How a task's outputs are scored.

    Attributes:
        name: As given to `compute`.
        description: One line for people.
        metrics: Reported unless others are asked for, in this order.
        normalize: Applied to every text first.
        lowercase: Whether BLEU ignores case.
        tokenize: sacrebleu's name of BLEU's tokenization; `none` where normalizing is tokenizing.
        max_references: More than these first ones are left out; None: all count.
        pads: Whether BLEU counts absent references as empty texts (which makes it higher), up to `max_references`.
        captions: Whether METEOR and ROUGE-L are those of image captioning: on Penn Treebank tokens without punctuation.
    """

    name: str
    description: str
    metrics: tuple[str, ...]
    normalize: Callable[[str], str] = squeeze
    lowercase: bool = False
    tokenize: str = "13a"
    max_references: int | None = None
    pads: bool = False
    captions: bool = False

    def prepare(self, text: str) -> str:
        """A text as this protocol counts it."""
        return _prepared(self.normalize, text)


@lru_cache(maxsize=1 << 16)
def _prepared(normalize: Callable[[str], str], text: str) -> str:
    """Many items share references, and every metric asks anew."""
    return normalize(text)


PROTOCOLS: dict[str, Protocol] = {
    protocol.name: protocol
    for protocol in (
        Protocol(
            "plain",
            "any text: sacrebleu's own settings, case counts",
            ("bleu", "chrf", "ter"),
        ),
        Protocol(
            "e2e",
            "E2E NLG challenge: lower-case BLEU, captioning's METEOR, ROUGE-L and CIDEr",
            ("bleu", "nist", "meteor", "rouge_l", "cider"),
            lowercase=True,
            captions=True,
        ),
        Protocol(
            "webnlg",
            "WebNLG 2017 challenge: ASCII, lower-case, words and signs apart; three references",
            ("bleu", "meteor", "ter"),
            normalize=_split_ascii_words,
            tokenize="none",
            max_references=3,
        ),
        Protocol(
            "dart",
            "DART: lower-case, words and signs apart; three references, BLEU counts absent ones as empty",
            ("bleu", "bleu_sound", "meteor", "ter"),
            normalize=_split_words,
            tokenize="none",
            max_references=3,
            pads=True,
        ),
        Protocol(
            "summarization",
            "summaries: ROUGE with stemming; of several references each metric's best",
            ("rouge_1", "rouge_2", "rouge_l"),
        ),
    )
}
