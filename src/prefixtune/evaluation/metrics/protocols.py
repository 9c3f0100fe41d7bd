"""How each task's official script prepares texts and counts references, and which metrics it reports.

`Texts` are outputs and references that a protocol prepares, once for all metrics.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Literal, TypeGuard

from prefixtune.evaluation.metrics.base import Unavailable, squeeze
from prefixtune.evaluation.metrics.java import treebank_words

ReferencePadding = Literal["", "longest", "all"]
"""Which absent references BLEU counts as empty texts, which raises it for short outputs: none, those up to the largest
number of references that any item has, or those up to `max_references`."""


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
        raise Unavailable(
            "unidecode is not installed, and WebNLG's normalization needs it", "pip install 'prefixtune[scores]'"
        ) from error
    return str(unidecode(text))


@dataclass(frozen=True)
class Protocol:
    """How a task's outputs are scored.

    Attributes:
        name: Its key in `PROTOCOLS`.
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
            # Any text: sacrebleu's defaults, case-sensitive.
            "plain",
            ("bleu", "chrf", "ter"),
        ),
        Protocol(
            # E2E NLG challenge: lower-case BLEU; METEOR, ROUGE-L and CIDEr as for image captions.
            "e2e",
            ("bleu", "nist", "meteor", "rouge_l", "cider"),
            lowercase=True,
            captions=True,
        ),
        Protocol(
            # WebNLG 2017 challenge: as dart, in ASCII.
            "webnlg",
            ("bleu", "meteor", "ter"),
            normalize=_split_ascii_words,
            normalize_reference=_ascii_split_words,
            tokenize="none",
            max_references=3,
            reference_padding="longest",
            smooth="none",
        ),
        Protocol(
            # DART: lower-case, words and signs separated; three references, BLEU counts absent ones as empty.
            "dart",
            ("bleu", "bleu_sound", "meteor", "ter"),
            normalize=_split_words,
            tokenize="none",
            max_references=3,
            reference_padding="all",
            smooth="none",
        ),
        Protocol(
            # Summaries: ROUGE with stemming; with several references the best one for each metric.
            "summarization",
            ("rouge_1", "rouge_2", "rouge_l"),
        ),
    )
}


class Texts:
    """A set of items.

    Args:
        protocol: How texts are prepared.
        hypotheses: One text per item; may be empty.
        references: The references of each item, at least one that is not blank; blank ones are left out.

    Raises:
        ValueError: The counts differ, there is no item, or an item has no reference.
    """

    def __init__(
        self,
        protocol: Protocol,
        hypotheses: Sequence[str],
        references: Sequence[Sequence[str]],
    ) -> None:
        self.protocol = protocol
        self.raw_hypotheses = list(hypotheses)
        self.raw_references = [item[: protocol.max_references] for item in _check_references(hypotheses, references)]

    @cached_property
    def hypotheses(self) -> list[str]:
        """The prepared hypotheses."""
        return [self.protocol.prepare(text) for text in self.raw_hypotheses]

    @cached_property
    def references(self) -> list[list[str]]:
        """The prepared references."""
        return [[self.protocol.prepare_reference(text) for text in item] for item in self.raw_references]

    @cached_property
    def treebank(self) -> tuple[list[str], list[list[str]]]:
        """Hypotheses and references as Penn Treebank words without punctuation; a text may have none.

        Raises:
            Unavailable: Java or pycocoevalcap is missing.
        """
        flat = [*self.hypotheses, *(text for item in self.references for text in item)]
        words = iter(treebank_words(flat))
        hypotheses = [next(words) for _ in self.hypotheses]
        return hypotheses, [[next(words) for _ in item] for item in self.references]

    def part(self, items: Sequence[int]) -> Texts:
        """Some of the items, as a set of their own; texts that are already tokenized are not tokenized again."""
        chosen = Texts(
            self.protocol,
            [self.raw_hypotheses[index] for index in items],
            [self.raw_references[index] for index in items],
        )
        if "treebank" in self.__dict__:
            hypotheses, references = self.treebank
            chosen.treebank = [hypotheses[index] for index in items], [references[index] for index in items]
        return chosen


def _check_references(hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> list[list[str]]:
    """The references without blank ones, after checking that everything can be scored.

    Raises:
        ValueError: They are no texts, the counts differ, there is no item, or an item has no reference.
    """
    lists = [hypotheses, *references] if _is_list(references) else [None]
    if not all(_is_list(each) and all(isinstance(text, str) for text in each) for each in lists):
        raise ValueError("hypotheses must be a list of strings, and references a list of lists of strings")
    if len(hypotheses) != len(references):
        raise ValueError(f"{len(hypotheses)} hypotheses but references for {len(references)} items; counts must agree")
    if not hypotheses:
        raise ValueError("there is no hypothesis; at least one is needed")
    kept = [[text for text in item if text.strip()] for item in references]
    for index, item in enumerate(kept):
        if not item:
            raise ValueError(f"item {index} (from 0) has no reference; at least one text is needed")
    return kept


def _is_list(value: object) -> TypeGuard[Collection[object]]:
    return isinstance(value, Collection) and not isinstance(value, str)
