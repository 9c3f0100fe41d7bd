"""METEOR 1.5: the counts come from its own Java program, the score of summed counts is computed here."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from prefixtune.evaluation.metrics.java import jar_path, java_failure, package_version, run_java, squeeze
from prefixtune.evaluation.metrics.measurement import Array, Measurement
from prefixtune.evaluation.metrics.protocols import Texts

METEOR_JAR = "meteor/meteor-1.5.jar"
# METEOR 1.5's parameters for English, and the weight of each matcher (Denkowski & Lavie 2014).
_ALPHA, _BETA, _GAMMA, _DELTA = 0.85, 0.2, 0.6, 0.75
_MATCHER_WEIGHTS = (1.0, 0.6, 0.8, 0.6)
_NUM_COUNTS = 23


def meteor(texts: Texts) -> Measurement:
    """METEOR 1.5, English, with its own normalization; under a captioning protocol on Penn Treebank words."""
    captions = texts.protocol.captions
    hypotheses, references = texts.treebank if captions else (texts.hypotheses, texts.references)
    how = "Penn Treebank words without punctuation" if captions else "the protocol's texts"
    counts = np.array(meteor_statistics(hypotheses, references), dtype=float)
    # A text that equals its reference has no break, so its one chunk counts as none, as when the program sums counts.
    counts[(counts[:, [21, 22]] == counts[:, [0, 1]]).all(axis=1) & (counts[:, 20] == 1), 20] = 0
    version = package_version("pycocoevalcap")
    how = f"METEOR 1.5 of pycocoevalcap {version} (-l en -norm, {how}); protocol {texts.protocol.name}"
    return Measurement(counts, meteor_score, how)


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
    # `|||` separates texts, so it is removed from them.
    lines = [
        " ||| ".join(["SCORE", *(squeeze(text.replace("|||", " ")) for text in [*item, hypothesis])])
        for hypothesis, item in zip(hypotheses, references, strict=True)
    ]
    command = ["-Xmx2G", "-jar", str(jar_path(METEOR_JAR)), "-", "-", "-stdio", "-l", "en", "-norm"]
    rows = [line.split() for line in run_java(command, lines)]
    if wrong := [row for row in rows if len(row) != _NUM_COUNTS]:
        raise java_failure(f"METEOR wrote {' '.join(wrong[0])[:200]!r}")
    return [[float(word) for word in row] for row in rows]


# --- translation edit rate --------------------------------------------------------------------------------------------


# sacrebleu's search ends after so many shifts tried; it has no name without an underscore.
_MAX_SHIFTS_TRIED = 1000
# A longer text reaches that limit before its first shift, but its table of distances would take gigabytes.
_MAX_WORDS = 2000


def ter(texts: Texts) -> Measurement:
    """Translation edit rate, 0 upward, lower is better: the fewest edits over the mean length of the references.

    Case is ignored; words are separated by white space.
    """
    import sacrebleu

    metric = sacrebleu.TER()
    rows = []
    for hypothesis, references in zip(texts.hypotheses, texts.references, strict=True):
        words, *others = (metric.tokenizer(text).split() for text in (hypothesis, *references))
        rows.append([min(edits(words, other) for other in others), sum(map(len, others)) / len(others)])

    def total(sums: Array) -> float:
        return float(metric._compute_score_from_stats(sums.tolist()).score) / 100

    settings = "case:lc|tok:tercom|norm:no|punct:yes|asian:no"
    how = f"sacrebleu {sacrebleu.__version__} ({settings}; exact edit distances by rapidfuzz)"
    return Measurement(np.array(rows, dtype=float), total, f"{how}; protocol {texts.protocol.name}")


def edits(hypothesis: Sequence[str], reference: Sequence[str]) -> int:
    """The number of insertions, deletions, substitutions and block shifts that make the reference of the hypothesis.

    As sacrebleu's `translation_edit_rate` counts them: of the shifts that lower the edit distance the best one is
    applied, until none does.

    >>> edits("a b c d e".split(), "d e a b c".split()), edits("a b".split(), "a x b".split())
    (1, 1)
    """
    from rapidfuzz.distance import Levenshtein
    from sacrebleu.metrics import lib_ter

    words, wanted = list(hypothesis), list(reference)
    if not wanted or max(len(words), len(wanted)) > _MAX_WORDS:
        return Levenshtein.distance(words, wanted)
    alignment = lib_ter.BeamEditDistance(wanted)
    shifts = tried = 0

    def distance(text: list[str]) -> tuple[int, str]:
        # Only the text that the shifts start from needs its alignment.
        return Levenshtein.distance(text, wanted), alignment(text)[1] if text is words else ""

    while True:
        gain, shifted, tried = lib_ter._shift(words, wanted, distance, tried)
        if gain <= 0 or tried >= _MAX_SHIFTS_TRIED:
            return shifts + Levenshtein.distance(words, wanted)
        words, shifts = shifted, shifts + 1
