"""METEOR 1.5: the counts come from its own Java program, the score of summed counts is computed here."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from prefixtune.evaluation.metrics.base import Array, ItemStatistics, package_version, squeeze
from prefixtune.evaluation.metrics.java import jar_path, java_failure, run_java
from prefixtune.evaluation.metrics.protocols import Texts

METEOR_JAR = "meteor/meteor-1.5.jar"
# METEOR 1.5's parameters for English, and the weight of each matcher (Denkowski & Lavie 2014).
_ALPHA, _BETA, _GAMMA, _DELTA = 0.85, 0.2, 0.6, 0.75
_MATCHER_WEIGHTS = (1.0, 0.6, 0.8, 0.6)
_NUM_COUNTS = 23


def meteor(texts: Texts) -> ItemStatistics:
    """METEOR 1.5, English, with its own normalization; under a captioning protocol on Penn Treebank words."""
    if texts.protocol.captions:
        hypotheses, references = texts.treebank
        how = "Penn Treebank words without punctuation"
    else:
        hypotheses, references = texts.hypotheses, texts.references
        how = "the protocol's texts"
    counts = np.array(meteor_statistics(hypotheses, references), dtype=float)
    # A text that equals its reference has no break, so its one chunk counts as none, as when the program sums counts.
    counts[(counts[:, [21, 22]] == counts[:, [0, 1]]).all(axis=1) & (counts[:, 20] == 1), 20] = 0
    version = package_version("pycocoevalcap", "METEOR")
    return ItemStatistics(
        counts,
        meteor_score,
        f"METEOR 1.5 of pycocoevalcap {version} (-l en -norm, {how}); protocol {texts.protocol.name}",
    )


def meteor_score(counts: Array) -> float:
    """METEOR of summed counts (see `meteor_statistics`), 0 to 1, as the program's EVAL computes it.

    Args:
        counts: Shape (23,).
    """
    lengths, function, matches = counts[0:2], counts[2:4], counts[4:20].reshape(4, 2, 2)
    chunks, matched = counts[20], counts[21:23]
    # matches: matcher x (content, function) x (hypothesis, reference)
    share = np.array([_DELTA, 1 - _DELTA])
    weighted = np.einsum("mkt,m,k->t", matches, np.array(_MATCHER_WEIGHTS), share)
    sizes = _DELTA * (lengths - function) + (1 - _DELTA) * function
    if not weighted.all() or not sizes.all():
        return 0.0
    precision, recall = weighted / sizes
    mean = precision * recall / (_ALPHA * precision + (1 - _ALPHA) * recall)
    return float(mean * (1 - _GAMMA * (chunks / matched.mean()) ** _BETA))


def meteor_statistics(hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> list[list[float]]:
    """METEOR's 23 counts for each item, against the best of its references.

    These are the lengths of hypothesis and reference; the numbers of their function words; for each of the four
    matchers (exact, stem, synonym, paraphrase) the matched content words of both and the matched function words of
    both; the chunks; and all matched words of both.

    Raises:
        Unavailable: Java or pycocoevalcap is missing, or the program failed.
    """
    jar = jar_path(METEOR_JAR, "METEOR")
    # `|||` separates texts, so it is removed from them.
    lines = [
        " ||| ".join(["SCORE", *(squeeze(text.replace("|||", " ")) for text in [*item, hypothesis])])
        for hypothesis, item in zip(hypotheses, references, strict=True)
    ]
    command = ["-Xmx2G", "-jar", str(jar), "-", "-", "-stdio", "-l", "en", "-norm"]
    return [_counts(line) for line in run_java(command, lines)]


def _counts(line: str) -> list[float]:
    try:
        counts = [float(word) for word in line.split()]
    except ValueError:
        counts = []
    if len(counts) != _NUM_COUNTS:
        raise java_failure("METEOR", f"it wrote {line[:200]!r}")
    return counts
