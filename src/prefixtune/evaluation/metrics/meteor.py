"""METEOR, CIDEr and the ROUGE-L of image captioning, as the COCO evaluation and the E2E challenge compute them.

METEOR's counts come from its own program, CIDEr and ROUGE-L from pycocoevalcap. Knows nothing of files and tasks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from prefixtune.evaluation.metrics.base import Array, Rows
from prefixtune.evaluation.metrics.java import meteor_statistics, package_version

if TYPE_CHECKING:
    from prefixtune.evaluation.metrics.texts import Texts

__all__ = ["caption_rouge_l", "cider", "meteor", "meteor_score"]


# METEOR 1.5's parameters for English, and what a match of each matcher is worth (Denkowski & Lavie 2014).
_ALPHA, _BETA, _GAMMA, _DELTA = 0.85, 0.2, 0.6, 0.75
_WORTH = (1.0, 0.6, 0.8, 0.6)


def meteor(texts: Texts) -> Rows:
    """METEOR 1.5, English, with its own normalization; under a captioning protocol on Penn Treebank words."""
    if texts.protocol.captions:
        hypotheses, references = texts.treebank
        how = "Penn Treebank words without punctuation"
    else:
        hypotheses, references = texts.hypotheses, texts.references
        how = "the protocol's texts"
    rows = np.array(meteor_statistics(hypotheses, references), dtype=float)
    # A text that is its reference counts as unbroken, so its one chunk is none (as where the program adds counts up).
    rows[(rows[:, [21, 22]] == rows[:, [0, 1]]).all(axis=1) & (rows[:, 20] == 1), 20] = 0
    version = package_version("pycocoevalcap", "METEOR")
    return Rows(
        rows,
        meteor_score,
        f"METEOR 1.5 of pycocoevalcap {version} (-l en -norm, {how}); protocol {texts.protocol.name}",
    )


def meteor_score(counts: Array) -> float:
    """METEOR of summed counts (see `java.meteor_statistics`), 0 to 1; what the program's EVAL says.

    Args:
        counts: Shape (23,).
    """
    lengths, function, matches = counts[0:2], counts[2:4], counts[4:20].reshape(4, 2, 2)
    chunks, matched = counts[20], counts[21:23]
    # matches: matcher x (content, function) x (hypothesis, reference)
    share = np.array([_DELTA, 1 - _DELTA])
    weighted = np.einsum("mkt,m,k->t", matches, np.array(_WORTH), share)
    sizes = _DELTA * (lengths - function) + (1 - _DELTA) * function
    if not weighted.all() or not sizes.all():
        return 0.0
    precision, recall = weighted / sizes
    mean = precision * recall / (_ALPHA * precision + (1 - _ALPHA) * recall)
    return float(mean * (1 - _GAMMA * (chunks / matched.mean()) ** _BETA))


def cider(texts: Texts) -> Rows:
    """CIDEr, 0 to 10, on Penn Treebank words without punctuation; how rare a word is, all references say."""
    version = package_version("pycocoevalcap", "CIDEr")
    from pycocoevalcap.cider.cider import Cider

    hypotheses, references = texts.treebank
    if not any(text for item in references for text in item):
        raise ValueError("CIDEr needs a word in the references, but they hold punctuation alone")
    _, scores = Cider().compute_score(dict(enumerate(references)), {n: [text] for n, text in enumerate(hypotheses)})
    return _mean(scores, f"pycocoevalcap {version} (Penn Treebank words without punctuation)", texts, local=False)


def caption_rouge_l(texts: Texts) -> Rows:
    """ROUGE-L as an F score with beta 1.2, on Penn Treebank words without punctuation, 0 to 1."""
    version = package_version("pycocoevalcap", "ROUGE-L")
    from pycocoevalcap.rouge.rouge import Rouge

    hypotheses, references = texts.treebank
    _, scores = Rouge().compute_score(dict(enumerate(references)), {n: [text] for n, text in enumerate(hypotheses)})
    how = "F with beta 1.2, best precision and best recall over references, Penn Treebank words without punctuation"
    return _mean(scores, f"pycocoevalcap {version} ({how})", texts)


def _mean(scores: Array, implementation: str, texts: Texts, local: bool = True) -> Rows:
    rows = np.stack([np.asarray(scores, dtype=float), np.ones(len(scores))], axis=1)
    return Rows(rows, mean, f"{implementation}; protocol {texts.protocol.name}", local)


def mean(sums: Array) -> float:
    """The mean of items whose scores and number were summed."""
    return float(sums[0] / sums[1])
