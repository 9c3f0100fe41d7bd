"""How each task's official script prepares texts and counts references, and which metrics it reports."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from prefixtune.evaluation.metrics.base import Unavailable

__all__ = ["PROTOCOLS", "Protocol", "ReferencePadding", "squeeze"]

ReferencePadding = Literal["", "longest", "all"]
"""Which absent references BLEU counts as empty texts, which raises it for short outputs: none, those up to the largest
number of references that any item has, or those up to `max_references`."""


# Lower-casing "İ" leaves a dot behind the i; it stays, so that texts that are prepared already (as DART's references
# are) do not change.
_NON_WORD = re.compile(r"((?!(?<=i)\u0307)\W)")


def squeeze(text: str) -> str:
    r"""A text on one line: every run of white space, line and paragraph separators among it, becomes one space.

    >>> squeeze(" a\tb\u2028c\n")
    'a b c'
    """
    return " ".join(text.split())


def _split_words(text: str) -> str:
    """Put spaces around every character that is no letter, digit or underscore, then lower-case (WebNLG's script)."""
    return squeeze(_NON_WORD.sub(r" \1 ", text).lower())


def _split_ascii_words(text: str) -> str:
    """As the script does with outputs: first to ASCII, so that the characters a sign becomes are split too."""
    return _split_words(_to_ascii(text))


def _ascii_split_words(text: str) -> str:
    """As it does with references: last to ASCII."""
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
        name: Its key in `PROTOCOLS`.
        description: One line for people.
        metrics: Computed by default, in this order.
        normalize: Applied to every text first.
        lowercase: Whether BLEU and NIST ignore the case of A to Z (other letters keep it, as in the official script).
        tokenize: sacrebleu's name of BLEU's tokenization; `none` where normalizing is tokenizing.
        max_references: Only the first so many references count; None: all.
        normalize_reference: Applied to every reference instead of `normalize`; None: as for outputs.
        reference_padding: Which absent references BLEU counts as empty texts.
        smooth: sacrebleu's name of BLEU's smoothing if an n-gram order has no match.
        captions: Whether METEOR and ROUGE-L are those of image captioning: on Penn Treebank words without punctuation.
    """

    name: str
    description: str
    metrics: tuple[str, ...]
    normalize: Callable[[str], str] = squeeze
    lowercase: bool = False
    tokenize: str = "13a"
    max_references: int | None = None
    normalize_reference: Callable[[str], str] | None = None
    reference_padding: ReferencePadding = ""
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
    """Cached, because many items share references and every metric needs them."""
    return normalize(text)


PROTOCOLS: dict[str, Protocol] = {
    protocol.name: protocol
    for protocol in (
        Protocol(
            "plain",
            "any text: sacrebleu's defaults, case-sensitive",
            ("bleu", "chrf", "ter"),
        ),
        Protocol(
            "e2e",
            "E2E NLG challenge: lower-case BLEU; METEOR, ROUGE-L and CIDEr as for image captions",
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
            reference_padding="longest",
            smooth="none",
        ),
        Protocol(
            "dart",
            "DART: lower-case, words and signs separated; three references, BLEU counts absent ones as empty",
            ("bleu", "bleu_sound", "meteor", "ter"),
            normalize=_split_words,
            tokenize="none",
            max_references=3,
            reference_padding="all",
            smooth="none",
        ),
        Protocol(
            "summarization",
            "summaries: ROUGE with stemming; with several references the best one for each metric",
            ("rouge_1", "rouge_2", "rouge_l"),
        ),
    )
}
