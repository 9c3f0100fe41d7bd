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
from pathlib import Path
from statistics import mean, stdev

import sacrebleu

FOLDER = Path(__file__).parent
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
    """The prefix less each other method, at each size and by the mean over sizes: Student's interval over samples.

    The p-values of the means over sizes decide the claims: Holm's correction for their number.
    """
    from scipy.stats import ttest_1samp

    sizes = {}
    for point, values in scores.items():
        method, _, size = point.rpartition("-n")
        sizes.setdefault(method, {})[int(size)] = values
    prefix = sizes.pop("prefix-examples")
    claims = []
    for method, others in sizes.items():
        each = {size: [a - b for a, b in zip(prefix[size], others[size], strict=True)] for size in sorted(prefix)}
        whole = [mean(sample) for sample in zip(*each.values(), strict=True)]
        for name, differences in [*each.items(), ("all sizes", whole)]:
            test = ttest_1samp(differences, 0)
            low, high = test.confidence_interval()
            print(f"  less {method}, {name}: {mean(differences):+.2f} (95 %: {low:+.2f} to {high:+.2f})")
        claims.append((test.pvalue, method))
    corrected = 0.0
    for left, (p_value, method) in zip(range(len(claims), 0, -1), sorted(claims), strict=True):
        corrected = max(corrected, min(1.0, left * p_value))
        print(f"  claim against {method}: p = {p_value:.2g}, corrected {corrected:.2g}")


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
