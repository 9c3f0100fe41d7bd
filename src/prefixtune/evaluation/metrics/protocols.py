"""How each task's official script prepares texts and counts references, and which metrics it reports.

`prepare_texts` does it once for all metrics.
"""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, TypeGuard

from prefixtune.evaluation.metrics.java import Unavailable, squeeze, treebank_words

ReferencePadding = Literal["", "longest", "all"]
"""Which absent references BLEU counts as empty texts, which raises it for short outputs: none, those up to the largest
number of references that any item has, or those up to `max_references`."""

LOWERCASE = str.maketrans(string.ascii_uppercase, string.ascii_lowercase)
# Lower-casing "İ" leaves a dot behind the i; it stays, so that texts that are prepared already (as DART's references
# are) do not change.
_NON_WORD = re.compile(r"((?!(?<=i)\u0307)\W)")


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
        raise Unavailable("unidecode is not installed", "pip install 'prefixtune[scores]'") from error
    return str(unidecode(text))


@dataclass(frozen=True)
class Protocol:
    """How a task's outputs are scored.

    Attributes:
        name: Its key in `PROTOCOLS`.
        metrics: Computed by default, in this order.
        prepare: Applied to every text first.
        lowercase: Whether BLEU and NIST ignore the case of A to Z (other letters keep it, as in the official script).
        tokenize: sacrebleu's name of BLEU's tokenization; `none` where preparing is tokenizing.
        max_references: Only the first so many references count; None: all.
        prepare_reference: Applied to every reference in place of `prepare`; None: as for outputs.
        reference_padding: Which absent references BLEU counts as empty texts.
        smooth: sacrebleu's name of BLEU's smoothing if an n-gram order has no match.
        captions: Whether METEOR and ROUGE-L are those of image captioning: on Penn Treebank words without punctuation.
    """

    name: str
    metrics: tuple[str, ...]
    prepare: Callable[[str], str] = squeeze
    lowercase: bool = False
    tokenize: str = "13a"
    max_references: int | None = None
    prepare_reference: Callable[[str], str] | None = None
    reference_padding: ReferencePadding = ""
    smooth: str = "exp"
    captions: bool = False


_OF_TRIPLES: dict[str, Any] = {"tokenize": "none", "max_references": 3, "smooth": "none"}
_WEBNLG: dict[str, Any] = {"prepare": _split_ascii_words, "prepare_reference": _ascii_split_words, **_OF_TRIPLES}
PROTOCOLS: dict[str, Protocol] = {
    protocol.name: protocol
    for protocol in (
        # Any text: sacrebleu's defaults, case-sensitive.
        Protocol("plain", ("bleu", "chrf", "ter")),
        # E2E NLG challenge: lower-case BLEU; METEOR, ROUGE-L and CIDEr as for image captions.
        Protocol("e2e", ("bleu", "nist", "meteor", "rouge_l", "cider"), lowercase=True, captions=True),
        # WebNLG 2017 challenge: as dart, in ASCII.
        Protocol("webnlg", ("bleu", "meteor", "ter"), reference_padding="longest", **_WEBNLG),
        # DART: lower-case, words and signs separated; three references, BLEU counts absent ones as empty.
        Protocol(
            "dart",
            ("bleu", "bleu_sound", "meteor", "ter"),
            prepare=_split_words,
            reference_padding="all",
            **_OF_TRIPLES,
        ),
        # Summaries: ROUGE with stemming; with several references the best one for each metric.
        Protocol("summarization", ("rouge_1", "rouge_2", "rouge_l")),
    )
}


@dataclass(frozen=True)
class Texts:
    """A set of items: outputs, and the references of each, as a protocol prepares them.

    Attributes:
        matches: Whether each output equals one of its references, where these are prepared as outputs are.
    """

    protocol: Protocol
    hypotheses: list[str]
    references: list[list[str]]
    matches: list[bool]

    @cached_property
    def treebank(self) -> tuple[list[str], list[list[str]]]:
        """Hypotheses and references as Penn Treebank words without punctuation; a text may have none.

        Raises:
            Unavailable: Java or pycocoevalcap is missing.
        """
        words = iter(treebank_words([*self.hypotheses, *(text for item in self.references for text in item)]))
        hypotheses = [next(words) for _ in self.hypotheses]
        return hypotheses, [[next(words) for _ in item] for item in self.references]

    def cased(self, text: str) -> str:
        """A text for BLEU: A to Z in lower case if the protocol ignores case, other letters unchanged."""
        return text.translate(LOWERCASE) if self.protocol.lowercase else text

    def part(self, items: Sequence[int]) -> Texts:
        """Some of the items, as a set of their own; texts that are already tokenized are not tokenized again."""
        of: list[list[Any]] = [self.hypotheses, self.references, self.matches]
        of += self.treebank if "treebank" in self.__dict__ else ()
        hypotheses, references, matches, *treebank = ([column[index] for index in items] for column in of)
        chosen = Texts(self.protocol, hypotheses, references, matches)
        if treebank:
            chosen.__dict__["treebank"] = tuple(treebank)
        return chosen


def prepare_texts(protocol: Protocol, hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> Texts:
    """Texts as a protocol counts them.

    Args:
        protocol: How texts are prepared.
        hypotheses: One text per item; may be empty.
        references: The references of each item, at least one that is not blank; blank ones are left out.

    Raises:
        ValueError: They are no texts, the counts differ, there is no item, or an item has no reference.
        Unavailable: A library that the protocol needs is missing.
    """
    lists = [hypotheses, *references] if _is_list(references) else [None]
    if not all(_is_list(each) and all(isinstance(text, str) for text in each) for each in lists):
        raise ValueError("hypotheses must be a list of strings, and references a list of lists of strings")
    if len(hypotheses) != len(references) or not hypotheses:
        raise ValueError(f"there are {len(hypotheses)} hypotheses, and references for {len(references)} items")
    kept = [[text for text in item if text.strip()][: protocol.max_references] for item in references]
    if not all(kept):
        raise ValueError(f"item {kept.index([])} (from 0) has no reference; at least one text is needed")
    of_references = protocol.prepare_reference or protocol.prepare
    outputs, prepared = [*map(protocol.prepare, hypotheses)], [[*map(of_references, item)] for item in kept]
    alike = [[*map(protocol.prepare, item)] for item in kept] if protocol.prepare_reference else prepared
    return Texts(protocol, outputs, prepared, [text in item for text, item in zip(outputs, alike, strict=True)])


def _is_list(value: object) -> TypeGuard[Collection[object]]:
    return isinstance(value, Collection) and not isinstance(value, str)
