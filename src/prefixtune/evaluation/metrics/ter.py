"""Translation edit rate (Snover et al. 2006): sacrebleu's, with the edit distances of shifted texts from rapidfuzz.

sacrebleu alone takes minutes for a test set: almost all of it for the edit distance of each shifted text. So its search
for shifts runs here on rapidfuzz's distances, which are exact; sacrebleu's own look only near the diagonal, and differ
for long texts of another order.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from prefixtune.evaluation.metrics.base import Array, ItemStatistics
from prefixtune.evaluation.metrics.protocols import Texts

# sacrebleu's search ends after so many shifts tried; it has no name without an underscore.
_MAX_SHIFTS_TRIED = 1000
# A longer text reaches that limit before its first shift, but its table of distances would take gigabytes.
_MAX_WORDS = 2000


def ter(texts: Texts) -> ItemStatistics:
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
    return ItemStatistics(np.array(rows, dtype=float), total, f"{how}; protocol {texts.protocol.name}")


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
