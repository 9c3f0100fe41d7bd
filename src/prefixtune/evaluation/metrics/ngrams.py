"""Metrics that count shared words, word sequences and characters: BLEU, NIST, chrF++, ROUGE, TER.

BLEU and chrF++ are sacrebleu's, ROUGE is rouge-score's. NIST is counted here, since the libraries' figures are not
those of the E2E challenge's script; so is TER, by sacrebleu's rules, for its speed.

Knows nothing of files and tasks.
"""

from __future__ import annotations

import math
import string
from collections import Counter
from typing import TYPE_CHECKING, Any

import numpy as np

from prefixtune.evaluation.metrics.base import Array, Rows
from prefixtune.evaluation.metrics.java import package_version
from prefixtune.evaluation.metrics.meteor import caption_rouge_l, mean
from prefixtune.evaluation.metrics.ter import edits

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from prefixtune.evaluation.metrics.protocols import Protocol
    from prefixtune.evaluation.metrics.texts import Texts

__all__ = ["bleu", "chrf", "nist", "rouge", "sound_bleu", "ter"]


_ORDER = 5
_SMALL = str.maketrans(string.ascii_uppercase, string.ascii_lowercase)
# A text two thirds as long as its references loses half of its NIST score (Doddington 2002).
_BREVITY = math.log(0.5) / math.log(1.5) ** 2


def bleu(texts: Texts) -> Rows:
    """Corpus BLEU, 0 to 100; under a protocol that pads, absent references count as empty texts."""
    return _bleu(texts, pads=texts.protocol.pads)


def sound_bleu(texts: Texts) -> Rows:
    """Corpus BLEU, 0 to 100; an absent reference counts as absent."""
    return _bleu(texts, pads="")


def _bleu(texts: Texts, pads: str) -> Rows:
    import sacrebleu

    protocol = texts.protocol
    metric = sacrebleu.BLEU(
        tokenize=protocol.tokenize,
        smooth_method=protocol.smooth,
        # No warning on stderr where texts are meant to be tokenized.
        force=protocol.tokenize == "none",
    )
    longest = max(map(len, texts.references))
    width = {"": 0, "longest": longest, "all": max(protocol.max_references or 0, longest)}[pads]
    hypotheses = [_cased(protocol, text) for text in texts.hypotheses]
    references = [
        [*(_cased(protocol, text) for text in item), *[""] * (width - len(item))] for item in texts.references
    ]
    rows = metric._extract_corpus_statistics(hypotheses, _streams(references))
    how = ", absent references counted as empty" if pads else ""

    def total(sums: Array) -> float:
        return float(metric._compute_score_from_stats(sums.tolist()).score)

    return Rows(np.array(rows, dtype=float), total, _by_sacrebleu(metric, texts, how))


def _cased(protocol: Protocol, text: str) -> str:
    """A text for BLEU and NIST: with A to Z small where the protocol ignores case, and other letters as they are."""
    return text.translate(_SMALL) if protocol.lowercase else text


def chrf(texts: Texts) -> Rows:
    """Corpus chrF++, 0 to 100: characters up to 6, words up to 2."""
    import sacrebleu

    metric = sacrebleu.CHRF(word_order=2)
    rows = metric._extract_corpus_statistics(texts.hypotheses, _streams(texts.references))

    def total(sums: Array) -> float:
        return float(metric._compute_score_from_stats(sums.tolist()).score)

    return Rows(np.array(rows, dtype=float), total, _by_sacrebleu(metric, texts))


def _streams(references: Sequence[Sequence[str]]) -> list[list[str | None]]:
    """First references, second references, ...; None where an item has no more."""
    width = max(map(len, references))
    return [[item[number] if number < len(item) else None for item in references] for number in range(width)]


def _by_sacrebleu(metric: Any, texts: Texts, how: str = "") -> str:
    import sacrebleu

    signature = str(metric.get_signature())
    if texts.protocol.lowercase and isinstance(metric, sacrebleu.BLEU):
        signature = signature.replace("case:mixed", "case:lc")
    return f"sacrebleu {sacrebleu.__version__} ({signature}){how}; protocol {texts.protocol.name}"


def ter(texts: Texts) -> Rows:
    """Translation edit rate, 0 upward, lower is better: the fewest edits over the mean length of the references.

    Case does not count; words are what white space parts.
    """
    rows = []
    for hypothesis, references in zip(texts.hypotheses, texts.references, strict=True):
        words = hypothesis.lower().split()
        others = [reference.lower().split() for reference in references]
        rows.append([min(edits(words, other) for other in others), sum(map(len, others)) / len(others)])

    def total(sums: Array) -> float:
        return float(sums[0] / sums[1]) if sums[1] else float(sums[0] > 0)

    how = "sacrebleu's rules of TER, case:lc|tok:tercom|norm:no|punct:yes|asian:no"
    return Rows(np.array(rows, dtype=float), total, f"prefixtune ({how}); protocol {texts.protocol.name}")


def nist(texts: Texts) -> Rows:
    """Corpus NIST of order 5 (Doddington 2002), 0 upward, lower-case, as the E2E challenge's script gives it.

    A shared word sequence counts as much as it tells: log2 of how many times rarer it is in all references than its
    beginning, the sequence without its last word. Lengths are compared with the references' mean number of words an
    item (all words of all references, over the mean number of references).
    """
    import sacrebleu

    tokenizer = sacrebleu.BLEU(tokenize=texts.protocol.tokenize).tokenizer
    words = [tokenizer(text.translate(_SMALL)).split() for text in texts.hypotheses]
    others = [[tokenizer(text.translate(_SMALL)).split() for text in item] for item in texts.references]
    grams = [[_grams(reference) for reference in item] for item in others]
    counts: Counter[tuple[str, ...]] = Counter()
    for item in grams:
        for found in item:
            counts.update(found)
    counts[()] = sum(len(reference) for item in others for reference in item)

    rows = np.zeros((len(words), 2 * _ORDER + 3))
    for row, hypothesis, references, item in zip(rows, words, others, grams, strict=True):
        most: Counter[tuple[str, ...]] = Counter()
        for found in item:
            most |= found
        for gram, count in _grams(hypothesis).items():
            shared = min(count, most[gram])
            if shared:
                row[len(gram) - 1] += shared * math.log2(counts[gram[:-1]] / counts[gram])
            row[_ORDER + len(gram) - 1] += count
        row[-3:] = sum(map(len, references)), len(references), 1
    version = sacrebleu.__version__
    how = f"order 5, case:lc, tok:{texts.protocol.tokenize} of sacrebleu {version}, mean reference length"
    return Rows(rows, _nist_score, f"prefixtune ({how}); protocol {texts.protocol.name}", local=False)


def _nist_score(sums: Array) -> float:
    told, found = sums[:_ORDER], sums[_ORDER : 2 * _ORDER]
    num_words, num_references, num_items = sums[-3:]
    if not found[0] or not num_words:
        return 0.0
    ratio = min(1.0, float(found[0] / (num_words / (num_references / num_items))))
    gain = sum(float(one / other) for one, other in zip(told, found, strict=True) if other)
    return gain * math.exp(_BREVITY * math.log(ratio) ** 2)


def _grams(words: Sequence[str]) -> Counter[tuple[str, ...]]:
    """Every word sequence of up to five words, with its count."""
    return Counter(
        tuple(words[start : start + size]) for size in range(1, _ORDER + 1) for start in range(len(words) - size + 1)
    )


def rouge(kind: str) -> Callable[[Texts], Rows]:
    """The metric ROUGE-1, ROUGE-2 or ROUGE-L (`1`, `2`, `L`): mean F1 of the items, 0 to 1, of each its best reference.

    With Porter stemming, by rouge-score; ROUGE-L of a captioning protocol is the captioning one.
    """

    def measure(texts: Texts) -> Rows:
        if kind == "L" and texts.protocol.captions:
            return caption_rouge_l(texts)
        version = package_version("rouge-score", f"ROUGE-{kind}")
        from rouge_score.rouge_scorer import RougeScorer

        name = f"rouge{kind}"
        scorer = RougeScorer([name], use_stemmer=True)
        scores = [
            scorer.score_multi(references, hypothesis)[name].fmeasure
            for hypothesis, references in zip(texts.hypotheses, texts.references, strict=True)
        ]
        how = "F1, Porter stemming, best reference"
        rows = np.stack([np.array(scores, dtype=float), np.ones(len(scores))], axis=1)
        return Rows(rows, mean, f"rouge-score {version} ({how}); protocol {texts.protocol.name}")

    return measure
