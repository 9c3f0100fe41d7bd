"""Metrics that count shared words, word sequences and characters: BLEU, NIST, chrF++, ROUGE, CIDEr.

BLEU and chrF++ are sacrebleu's, ROUGE is rouge-score's, CIDEr and the ROUGE-L of image captions are pycocoevalcap's.
NIST is counted here, because the libraries' figures differ from those of the E2E challenge's script.
"""

from __future__ import annotations

import math
import re
import string
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from prefixtune.evaluation.metrics.base import Array, ItemStatistics, Unavailable, average, package_version
from prefixtune.evaluation.metrics.protocols import Protocol, ReferencePadding, Texts

_ORDER = 5
_ROUGE_CHARACTER = re.compile("[a-z0-9]")
_LOWERCASE = str.maketrans(string.ascii_uppercase, string.ascii_lowercase)
# A text two thirds as long as its references loses half of its NIST score (Doddington 2002).
_BREVITY = math.log(0.5) / math.log(1.5) ** 2


def bleu(texts: Texts) -> ItemStatistics:
    """Corpus BLEU, 0 to 100; under a protocol that pads, absent references count as empty texts."""
    return _bleu(texts, padding=texts.protocol.reference_padding)


def bleu_without_padding(texts: Texts) -> ItemStatistics:
    """Corpus BLEU, 0 to 100; absent references are ignored, whatever the protocol."""
    return _bleu(texts, padding="")


def _bleu(texts: Texts, padding: ReferencePadding) -> ItemStatistics:
    import sacrebleu

    protocol = texts.protocol
    metric = sacrebleu.BLEU(
        tokenize=protocol.tokenize,
        smooth_method=protocol.smooth,
        # Avoids a warning on stderr for texts that are tokenized on purpose.
        force=protocol.tokenize == "none",
    )
    longest = max(map(len, texts.references))
    width = {"": 0, "longest": longest, "all": max(protocol.max_references or 0, longest)}[padding]
    hypotheses = [_cased(protocol, text) for text in texts.hypotheses]
    references = [
        [*(_cased(protocol, text) for text in item), *[""] * (width - len(item))] for item in texts.references
    ]
    statistics = metric._extract_corpus_statistics(hypotheses, _streams(references))
    how = ", absent references counted as empty" if padding else ""

    def total(sums: Array) -> float:
        return float(metric._compute_score_from_stats(sums.tolist()).score)

    values = np.array(statistics, dtype=float)
    return ItemStatistics(values, total, _by_sacrebleu(metric, texts, how), independent=padding != "longest")


def _cased(protocol: Protocol, text: str) -> str:
    """A text for BLEU and NIST: A to Z in lower case if the protocol ignores case, other letters unchanged."""
    return text.translate(_LOWERCASE) if protocol.lowercase else text


def chrf(texts: Texts) -> ItemStatistics:
    """Corpus chrF++, 0 to 100: characters up to 6, words up to 2."""
    import sacrebleu

    metric = sacrebleu.CHRF(word_order=2)
    statistics = metric._extract_corpus_statistics(texts.hypotheses, _streams(texts.references))

    def total(sums: Array) -> float:
        return float(metric._compute_score_from_stats(sums.tolist()).score)

    return ItemStatistics(np.array(statistics, dtype=float), total, _by_sacrebleu(metric, texts))


def _streams(references: Sequence[Sequence[str]]) -> list[list[str | None]]:
    """All first references, all second references, ...; None if an item has fewer."""
    width = max(map(len, references))
    return [[item[index] if index < len(item) else None for item in references] for index in range(width)]


def _by_sacrebleu(metric: Any, texts: Texts, how: str = "") -> str:
    import sacrebleu

    signature = str(metric.get_signature())
    if texts.protocol.lowercase and isinstance(metric, sacrebleu.BLEU):
        signature = signature.replace("case:mixed", "case:lc")
    return f"sacrebleu {sacrebleu.__version__} ({signature}){how}; protocol {texts.protocol.name}"


def nist(texts: Texts) -> ItemStatistics:
    """Corpus NIST of order 5 (Doddington 2002), 0 upward, lower-case, as the E2E challenge's script gives it.

    A shared word sequence counts as much as its information: log2 of how many times rarer it is in all references than
    the sequence without its last word. Lengths are compared with the references' mean number of words per item (all
    words of all references, divided by the mean number of references).
    """
    import sacrebleu

    tokenizer = sacrebleu.BLEU(tokenize=texts.protocol.tokenize).tokenizer
    words = [tokenizer(text.translate(_LOWERCASE)).split() for text in texts.hypotheses]
    others = [[tokenizer(text.translate(_LOWERCASE)).split() for text in item] for item in texts.references]
    grams = [[_grams(reference) for reference in item] for item in others]
    counts: Counter[tuple[str, ...]] = Counter()
    for item in grams:
        for reference_grams in item:
            counts.update(reference_grams)
    counts[()] = sum(len(reference) for item in others for reference in item)

    values = np.zeros((len(words), 2 * _ORDER + 3))
    for row, hypothesis, references, item in zip(values, words, others, grams, strict=True):
        most: Counter[tuple[str, ...]] = Counter()
        for reference_grams in item:
            most |= reference_grams
        for gram, count in _grams(hypothesis).items():
            shared = min(count, most[gram])
            if shared:
                row[len(gram) - 1] += shared * math.log2(counts[gram[:-1]] / counts[gram])
            row[_ORDER + len(gram) - 1] += count
        row[-3:] = sum(map(len, references)), len(references), 1
    version = sacrebleu.__version__
    how = f"order 5, case:lc, tok:{texts.protocol.tokenize} of sacrebleu {version}, mean reference length"
    return ItemStatistics(values, _nist_score, f"prefixtune ({how}); protocol {texts.protocol.name}", independent=False)


def _nist_score(sums: Array) -> float:
    information, num_grams = sums[:_ORDER], sums[_ORDER : 2 * _ORDER]
    num_words, num_references, num_items = sums[-3:]
    if not num_grams[0] or not num_words:
        return 0.0
    ratio = min(1.0, float(num_grams[0] / (num_words / (num_references / num_items))))
    gain = sum(float(one / other) for one, other in zip(information, num_grams, strict=True) if other)
    return gain * math.exp(_BREVITY * math.log(ratio) ** 2)


def _grams(words: Sequence[str]) -> Counter[tuple[str, ...]]:
    """Every sequence of up to five words, with its count."""
    return Counter(
        tuple(words[start : start + size]) for size in range(1, _ORDER + 1) for start in range(len(words) - size + 1)
    )


def rouge(kind: str, texts: Texts) -> ItemStatistics:
    """ROUGE-1, ROUGE-2 or ROUGE-L (`1`, `2`, `L`): mean F1 of the items, 0 to 1, with Porter stemming.

    Each item is compared with its best reference. Under a captioning protocol ROUGE-L is `caption_rouge_l`. Of a text,
    the letters a to z and digits count alone; where most of the references' are others, the metric is `Unavailable`.
    """
    if kind == "L" and texts.protocol.captions:
        return caption_rouge_l(texts)
    version = package_version("rouge-score", f"ROUGE-{kind}")
    from rouge_score.rouge_scorer import RougeScorer

    unread, name = _unread(texts.references), f"rouge{kind}"
    scorer = RougeScorer([name], use_stemmer=True)
    scores = [
        scorer.score_multi(references, hypothesis)[name].fmeasure
        for hypothesis, references in zip(texts.hypotheses, texts.references, strict=True)
    ]
    settings = f"F1, Porter stemming, best reference, words of a to z and 0 to 9{unread}"
    return average(scores, f"rouge-score {version} ({settings}); protocol {texts.protocol.name}")


def _unread(references: Sequence[Sequence[str]]) -> str:
    """What ROUGE cannot read of the references, for its implementation: how many have words, but none of a to z.

    Raises:
        Unavailable: Most of their letters and digits are others.
    """
    flat = [text for item in references for text in item]
    # Letters and digits of each, and those that count.
    counts = np.array([(sum(map(str.isalnum, text)), len(_ROUGE_CHARACTER.findall(text.lower()))) for text in flat])
    written, read = counts.sum(axis=0)
    if 2 * read < written:
        raise Unavailable(
            f"ROUGE counts the letters a to z and digits alone, and {1 - read / written:.0%} of the references' are "
            "others",
            "choose the metric chrf",
        )
    without = int(((counts[:, 0] > 0) & (counts[:, 1] == 0)).sum())
    return f", which {without} of {len(flat)} references lack" if without else ""


def cider(texts: Texts) -> ItemStatistics:
    """CIDEr, 0 to 10, on Penn Treebank words without punctuation; the set's references say how rare a word is."""
    version = package_version("pycocoevalcap", "CIDEr")
    from pycocoevalcap.cider.cider import Cider

    if not any(text for item in texts.treebank[1] for text in item):
        raise Unavailable(
            "CIDEr needs a word in the references, but they hold punctuation alone", "choose another metric"
        )
    settings = f"pycocoevalcap {version} (Penn Treebank words without punctuation)"
    return average(_caption_scores(Cider(), texts), f"{settings}; protocol {texts.protocol.name}", independent=False)


def caption_rouge_l(texts: Texts) -> ItemStatistics:
    """ROUGE-L as an F score with beta 1.2, on Penn Treebank words without punctuation, 0 to 1."""
    version = package_version("pycocoevalcap", "ROUGE-L")
    from pycocoevalcap.rouge.rouge import Rouge

    settings = (
        "F with beta 1.2, best precision and best recall over references, Penn Treebank words without punctuation"
    )
    implementation = f"pycocoevalcap {version} ({settings}); protocol {texts.protocol.name}"
    return average(_caption_scores(Rouge(), texts), implementation)


def _caption_scores(scorer: Any, texts: Texts) -> Array:
    """Each item's score by a metric of pycocoevalcap."""
    hypotheses, references = texts.treebank
    _, scores = scorer.compute_score(dict(enumerate(references)), {n: [text] for n, text in enumerate(hypotheses)})
    return np.asarray(scores, dtype=float)


def exact_match(texts: Texts) -> ItemStatistics:
    """The share of outputs that equal a reference as the protocol prepares them, in percent."""
    hits = [
        100.0 * (output in references) for output, references in zip(texts.hypotheses, texts.references, strict=True)
    ]
    return average(hits, "prefixtune (share of outputs equal to a reference)")
