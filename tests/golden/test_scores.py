"""Scores of published outputs by the metrics that need no Java, to their digits; an interval and a paired test.

Figures are rounded to the digits that docs/metrics.md promises (TER: three), and then equal exactly. The bounds of the
interval are compared to six digits.
"""

import gzip
import json
from pathlib import Path

import pytest

from prefixtune.evaluation.metrics import accuracy, bootstrap, macro_f1, measure, randomize, span_f1

DATA = Path(__file__).resolve().parents[2] / ".." / "shared" / "data"
GOLDEN = Path(__file__).with_name("scores.json")
DIGITS = {"bleu": 2, "chrf": 2, "exact_match": 2, "ter": 3}

pytestmark = pytest.mark.skipif(not (DATA / "fixtures").is_dir(), reason="shared/data/fixtures is not here")


def rows(name):
    with gzip.open(DATA / name, "rt", encoding="utf-8") as handle:
        return [json.loads(line) for line in handle]


def scores(name, outputs, references, protocol, metrics):
    """Rounded scores by name."""
    measured = measure(outputs, references, protocol=protocol, metrics=metrics.split())
    return {f"{name} {metric}": round(one.score, DIGITS.get(metric, 4)) for metric, one in measured.items()}


def compute():
    outputs = [row["output"] for row in rows("fixtures/e2e_test_tgen.jsonl.gz")]
    references = [item["references"] for item in rows("e2e/test.jsonl.gz")]
    # Of some items: the whole sets, by every official metric, are in tests/integrations/test_official_scores.py.
    found = scores("plain", outputs[:200], references[:200], "plain", "bleu chrf exact_match")
    found |= scores("plain 1/20", outputs[::20], references[::20], "plain", "ter")
    found |= scores("summarization", outputs[:200], references[:200], "summarization", "rouge_1 rouge_2 rouge_l")
    # Outputs that are worse: every third lost its last word.
    worse = [text.rsplit(" ", 1)[0] if n % 3 == 0 else text for n, text in enumerate(outputs[:200])]
    first, second = (
        measure(each, references[:200], protocol="e2e", metrics=["bleu"])["bleu"] for each in (outputs[:200], worse)
    )
    test = randomize(first, second, samples=500, seed=3)
    labels, gold = ["good", "bad", "good", "odd"], ["good", "bad", "bad", "good"]
    tags, right = [["B-TIME", "I-TIME", "O", "I-TRAIN"]], [["B-TIME", "I-TIME", "B-TRAIN", "O"]]
    return {
        "scores": found,
        "interval": list(bootstrap(first, samples=500, seed=3)),
        "difference": test.difference,
        "p_value": test.p_value,
        "labels": [accuracy(labels, gold).score, macro_f1(labels, gold).score, span_f1(tags, right).score],
    }


def test_scores():
    golden, found = json.loads(GOLDEN.read_text(encoding="utf-8")), compute()
    assert found.pop("scores") == golden.pop("scores")
    assert found == {name: pytest.approx(values, rel=1e-6) for name, values in golden.items()}
