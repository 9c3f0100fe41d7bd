"""The tasks' official ways of preparing texts before they are counted, and the metrics that they report.

A protocol knows normalization and conventions about references. It knows nothing of files, and computes no score.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

from prefixtune.evaluation.metrics.base import Unavailable

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
    """As the script does with outputs: to ASCII first, so that what a sign becomes is split, too."""
    return _split_words(_to_ascii(text))


def _ascii_split_words(text: str) -> str:
    """As it does with references: to ASCII last."""
    return squeeze(_to_ascii(_split_words(text)))


def _to_ascii(text: str) -> str:
    try:
        from unidecode import unidecode
    except ImportError as error:
        raise Unavailable(
            "unidecode is not installed, and WebNLG's normalization needs it", "pip install 'prefixtune[scores]'"
        ) from error
    return str(unidecode(text))


@dataclass(frozen=True)
class Protocol:
    """How a task's outputs are scored.

    Attributes:
        name: As given to `compute`.
        description: One line for people.
        metrics: Reported unless others are asked for, in this order.
        normalize: Applied to every text first.
        lowercase: Whether BLEU and NIST ignore the case of A to Z (other letters keep it, as in the official script).
        tokenize: sacrebleu's name of BLEU's tokenization; `none` where normalizing is tokenizing.
        max_references: More than these first ones are left out; None: all count.
        normalize_reference: Likewise for references; None: as for outputs.
        pads: Whether BLEU counts absent references as empty texts (which makes it higher for short outputs): empty: no;
            `longest`: up to as many as any item has; `all`: up to `max_references`.
        smooth: sacrebleu's name of BLEU's smoothing where an n-gram order has no match.
        captions: Whether METEOR and ROUGE-L are those of image captioning: on Penn Treebank tokens without punctuation.
    """

    name: str
    description: str
    metrics: tuple[str, ...]
    normalize: Callable[[str], str] = squeeze
    lowercase: bool = False
    tokenize: str = "13a"
    max_references: int | None = None
    normalize_reference: Callable[[str], str] | None = None
    pads: str = ""
    smooth: str = "exp"
    captions: bool = False

    def prepare(self, text: str) -> str:
        """An output as this protocol counts it."""
        return _prepared(self.normalize, text)

    def prepare_reference(self, text: str) -> str:
        """A reference as this protocol counts it."""
        return _prepared(self.normalize_reference or self.normalize, text)


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
            "WebNLG 2017 challenge: as dart, in ASCII",
            ("bleu", "meteor", "ter"),
            normalize=_split_ascii_words,
            normalize_reference=_ascii_split_words,
            tokenize="none",
            max_references=3,
            pads="longest",
            smooth="none",
        ),
        Protocol(
            "dart",
            "DART: lower-case, words and signs apart; three references, BLEU counts absent ones as empty",
            ("bleu", "bleu_sound", "meteor", "ter"),
            normalize=_split_words,
            tokenize="none",
            max_references=3,
            pads="all",
            smooth="none",
        ),
        Protocol(
            "summarization",
            "summaries: ROUGE with stemming; of several references each metric's best",
            ("rouge_1", "rouge_2", "rouge_l"),
        ),
    )
}
