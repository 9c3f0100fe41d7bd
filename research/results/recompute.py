"""Recompute BLEU of the tables in research/RESULTS.md from the outputs, with sacrebleu and nothing of prefixtune.

    python research/results/recompute.py PATH/e2e/test.jsonl.gz [STUDY ...]

PATH is where E2E's test set is, one JSON object with "references" a line. Without names: few-rows, methods and
low-data. The claims of few-rows are tested with scipy.
"""

import gzip
import hashlib
import json
import string
import sys
from math import sqrt
from pathlib import Path
from statistics import mean, stdev

import sacrebleu

FOLDER = Path(__file__).parent
FIRST_STAGE = 12
LOWERCASE = str.maketrans(string.ascii_uppercase, string.ascii_lowercase)


def main(data, *names):
    """Print the scores of some studies."""
    with gzip.open(data, "rt", encoding="utf-8") as file:
        entries = [json.loads(line)["references"] for line in file]
    references = {item_key(texts): texts for texts in entries}
    for name in names or ("few-rows", "methods", "low-data"):
        path = FOLDER / f"{name}.outputs.json.gz"
        print(f"\n{name}")
        if path.exists():
            scores = print_scores(json.loads(gzip.decompress(path.read_bytes())), references)
            if name == "few-rows":
                print_claims(scores)
        else:
            print(f"  {path.name} is not there: the study has not run yet")


def print_scores(study, references):
    """One line for each point: the mean over its runs, the standard deviation, and the range. Returns all scores."""
    items = [references[key] for key in study["items"]]
    scores = {}
    for index, cell in enumerate(study["cells"]):
        point = cell.rpartition("-subset")[0]
        scores.setdefault(point, []).append(bleu([texts[index] for texts in study["outputs"]], items))
    for point, values in scores.items():
        text = f"{mean(values):.1f}"
        if len(values) > 1:
            text += f" ± {stdev(values):.1f} ({min(values):.1f} to {max(values):.1f})"
        print(f"  {point}: {text}")
    return scores


def print_claims(scores):
    """The prefix less each other method, with intervals over samples, at each size and by the mean over sizes.

    The means over sizes decide the claims, by Stein's two-stage procedure: the first twelve samples give the standard
    deviation, all give the mean. Without more samples, that is Student's test. The p-value is multiplied by the number
    of claims, and by two where more samples were added after the first look.
    """
    from scipy.stats import t, ttest_1samp

    sizes = {}
    for point, values in scores.items():
        method, _, size = point.rpartition("-n")
        sizes.setdefault(method, {})[int(size)] = values
    prefix = sizes.pop("prefix-examples")
    for method, others in sizes.items():
        # Full fine-tuning has the first samples alone.
        each = {size: [a - b for a, b in zip(prefix[size], others[size], strict=False)] for size in sorted(prefix)}
        for size, differences in each.items():
            low, high = ttest_1samp(differences, 0).confidence_interval()
            print(f"  less {method}, {size}: {mean(differences):+.2f} (95 %: {low:+.2f} to {high:+.2f})")
        whole = [mean(sample) for sample in zip(*each.values(), strict=True)]
        first, middle = whole[:FIRST_STAGE], mean(whole)
        error, freedom = stdev(first) / sqrt(len(whole)), len(first) - 1
        half = t.ppf(0.975, freedom) * error
        p_value = 2 * t.sf(abs(middle) / error, freedom)
        corrected = min(1.0, p_value * len(sizes) * (2 if len(whole) > len(first) else 1))
        print(
            f"  claim against {method}, {len(whole)} samples: {middle:+.2f} ± {half:.2f}, corrected p = {corrected:.2g}"
        )


def bleu(outputs, items):
    """Corpus BLEU of the E2E challenge: A to Z in lower case, sacrebleu's 13a tokens, all references."""
    most = max(map(len, items))
    streams = [[prepare(texts[i]) if i < len(texts) else None for texts in items] for i in range(most)]
    return sacrebleu.corpus_bleu([prepare(text) for text in outputs], streams, tokenize="13a").score


def prepare(text):
    """A text on one line, A to Z in lower case."""
    return " ".join(text.split()).translate(LOWERCASE)


def item_key(texts):
    """By this a run's outputs find their references; the data set itself is not in this folder."""
    return hashlib.sha256("\n".join(" ".join(text.split()) for text in texts).encode("utf-8")).hexdigest()[:12]


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    main(*sys.argv[1:])
