"""Metrics that count shared words, word sequences and characters: BLEU, NIST, chrF++, ROUGE, CIDEr.

BLEU and chrF++ are sacrebleu's, ROUGE is rouge-score's, CIDEr and the ROUGE-L of image captions are pycocoevalcap's.
NIST is counted here, because the libraries' figures differ from those of the E2E challenge's script.
"""

from __future__ import annotations

import functools
import itertools
import math
import operator
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from prefixtune.evaluation.metrics.java import Unavailable, package_version
from prefixtune.evaluation.metrics.measurement import Array, Measurement, average
from prefixtune.evaluation.metrics.protocols import LOWERCASE, Texts

_ORDER = 5
_ROUGE_CHARACTER = re.compile("[a-z0-9]")
# A text two thirds as long as its references loses half of its NIST score (Doddington 2002).
_BREVITY = math.log(0.5) / math.log(1.5) ** 2


def bleu(texts: Texts, *, padded: bool = True) -> Measurement:
    """Corpus BLEU, 0 to 100; under a protocol that pads, absent references count as empty texts if `padded`."""
    import sacrebleu

    protocol, padding = texts.protocol, texts.protocol.reference_padding if padded else ""
    metric = sacrebleu.BLEU(
        tokenize=protocol.tokenize,
        smooth_method=protocol.smooth,
        # Avoids a warning on stderr for texts that are tokenized on purpose.
        force=protocol.tokenize == "none",
    )
    longest = max(map(len, texts.references))
    width = {"": 0, "longest": longest, "all": max(protocol.max_references or 0, longest)}[padding]
    hypotheses, *others = ([*map(texts.cased, item)] for item in (texts.hypotheses, *texts.references))
    references = [[*item, *[""] * (width - len(item))] for item in others]
    how = ", absent references counted as empty" if padding else ""
    return _by_sacrebleu(metric, hypotheses, references, texts, how, independent=padding != "longest")


def chrf(texts: Texts) -> Measurement:
    """Corpus chrF++, 0 to 100: characters up to 6, words up to 2."""
    import sacrebleu

    return _by_sacrebleu(sacrebleu.CHRF(word_order=2), texts.hypotheses, texts.references, texts)


def _by_sacrebleu(
    metric: Any,
    hypotheses: Sequence[str],
    references: Sequence[Sequence[str]],
    texts: Texts,
    how: str = "",
    *,
    independent: bool = True,
) -> Measurement:
    import sacrebleu

    # All first references, all second references, ...; None if an item has fewer.
    streams = [list(stream) for stream in itertools.zip_longest(*references)]
    statistics = np.array(metric._extract_corpus_statistics(hypotheses, streams), dtype=float)
    signature = str(metric.get_signature())
    if texts.protocol.lowercase and isinstance(metric, sacrebleu.BLEU):
        signature = signature.replace("case:mixed", "case:lc")

    def total(sums: Array) -> float:
        return float(metric._compute_score_from_stats(sums.tolist()).score)

    how = f"sacrebleu {sacrebleu.__version__} ({signature}){how}; protocol {texts.protocol.name}"
    return Measurement(statistics, total, how, independent=independent)


def nist(texts: Texts) -> Measurement:
    """Corpus NIST of order 5 (Doddington 2002), 0 upward, lower-case, as the E2E challenge's script gives it.

    A shared word sequence counts as much as its information: log2 of how many times rarer it is in all references than
    the sequence without its last word. Lengths are compared with the references' mean number of words per item (all
    words of all references, divided by the mean number of references).
    """
    import sacrebleu

    tokenizer = sacrebleu.BLEU(tokenize=texts.protocol.tokenize).tokenizer
    words, *others = (
        [tokenizer(text.translate(LOWERCASE)).split() for text in item]
        for item in (texts.hypotheses, *texts.references)
    )
    grams = [[_grams(reference) for reference in item] for item in others]
    counts: Counter[tuple[str, ...]] = Counter()
    for reference_grams in itertools.chain(*grams):
        counts.update(reference_grams)
    counts[()] = sum(map(len, itertools.chain(*others)))

    values = np.zeros((len(words), 2 * _ORDER + 3))
    for row, hypothesis, references, item in zip(values, words, others, grams, strict=True):
        most = functools.reduce(operator.or_, item)
        for gram, count in _grams(hypothesis).items():
            shared = min(count, most[gram])
            if shared:
                row[len(gram) - 1] += shared * math.log2(counts[gram[:-1]] / counts[gram])
            row[_ORDER + len(gram) - 1] += count
        row[-3:] = sum(map(len, references)), len(references), 1
    tokens = f"tok:{texts.protocol.tokenize} of sacrebleu {sacrebleu.__version__}"
    how = f"prefixtune (order 5, case:lc, {tokens}, mean reference length); protocol {texts.protocol.name}"
    return Measurement(values, _nist_score, how, independent=False)


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


def rouge(kind: str, texts: Texts) -> Measurement:
    """ROUGE-1, ROUGE-2 or ROUGE-L (`1`, `2`, `L`): mean F1 of the items, 0 to 1, with Porter stemming.

    Each item is compared with its best reference. Under a captioning protocol ROUGE-L is `caption_rouge_l`. Of a text,
    the letters a to z and digits count alone; where most of the references' are others, the metric is `Unavailable`.
    """
    if kind == "L" and texts.protocol.captions:
        return caption_rouge_l(texts)
    version = package_version("rouge-score")
    from rouge_score.rouge_scorer import RougeScorer

    characters = "".join(text.lower() for item in texts.references for text in item)
    read, written = len(_ROUGE_CHARACTER.findall(characters)), sum(map(str.isalnum, characters))
    if 2 * read < written:
        what = f"ROUGE counts the letters a to z and digits alone, and {1 - read / written:.0%} of the references' are"
        raise Unavailable(f"{what} others", "choose the metric chrf")
    name = f"rouge{kind}"
    scorer = RougeScorer([name], use_stemmer=True)
    scores = [
        scorer.score_multi(references, hypothesis)[name].fmeasure
        for hypothesis, references in zip(texts.hypotheses, texts.references, strict=True)
    ]
    settings = "F1, Porter stemming, best reference, words of a to z and 0 to 9"
    return average(scores, f"rouge-score {version} ({settings}); protocol {texts.protocol.name}")


def cider(texts: Texts) -> Measurement:
    """CIDEr, 0 to 10, on Penn Treebank words without punctuation; the set's references say how rare a word is."""
    if not any(itertools.chain(*texts.treebank[1])):
        raise Unavailable("CIDEr needs a word in the references, but there is none", "choose another metric")
    from pycocoevalcap.cider.cider import Cider

    return _by_captions(Cider(), texts, "", independent=False)


def caption_rouge_l(texts: Texts) -> Measurement:
    """ROUGE-L as an F score with beta 1.2, on Penn Treebank words without punctuation, 0 to 1."""
    package_version("pycocoevalcap")
    from pycocoevalcap.rouge.rouge import Rouge

    return _by_captions(Rouge(), texts, "F with beta 1.2, best precision and best recall over references, ")


def _by_captions(scorer: Any, texts: Texts, how: str, *, independent: bool = True) -> Measurement:
    """The mean of the items' scores by a metric of pycocoevalcap."""
    hypotheses, references = texts.treebank
    _, scores = scorer.compute_score(dict(enumerate(references)), {n: [text] for n, text in enumerate(hypotheses)})
    how = f"pycocoevalcap {package_version('pycocoevalcap')} ({how}Penn Treebank words without punctuation)"
    return average(scores, f"{how}; protocol {texts.protocol.name}", independent=independent)


def exact_match(texts: Texts) -> Measurement:
    """The share of outputs that equal a reference as the protocol prepares them, in percent."""
    return average([100.0 * match for match in texts.matches], "prefixtune (share of outputs equal to a reference)")
