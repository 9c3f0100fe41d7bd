"""Scores of published outputs by every metric of docs/metrics.md, to its digits; an interval and a paired test.

Figures are rounded to the digits that docs/metrics.md promises (TER: three), and then equal exactly. Without Java those
that need it are left out of the comparison. The bounds of the interval are compared to six digits.
"""

import gzip
import json
import shutil
from pathlib import Path

import pytest

from prefixtune.evaluation.metrics import accuracy, bootstrap, macro_f1, measure, randomize, span_f1

DATA = Path(__file__).resolve().parents[2] / ".." / "shared" / "data"
GOLDEN = Path(__file__).with_name("scores.json")
NEED_JAVA = ("cider", "e2e rouge_l")
DIGITS = {"bleu": 2, "bleu_sound": 2, "chrf": 2, "exact_match": 2, "ter": 3}

pytestmark = pytest.mark.skipif(not (DATA / "fixtures").is_dir(), reason="shared/data/fixtures is not here")


def rows(name):
    with gzip.open(DATA / name, "rt", encoding="utf-8") as handle:
        return [json.loads(line) for line in handle]


def scores(name, outputs, references, protocol, metrics, parts=None):
    """Rounded scores by name, of all items and of parts; without those that need Java where there is none."""
    named = {f"{name} {metric}": metric for metric in metrics.split()}
    if shutil.which("java") is None:
        named = {key: metric for key, metric in named.items() if not key.endswith(NEED_JAVA)}
    measured = measure(outputs, references, protocol=protocol, metrics=list(named.values()))
    found = {}
    for key, metric in named.items():
        digits = DIGITS.get(metric, 4)
        found[key] = round(measured[metric].score, digits)
        for part, items in (parts or {}).items():
            found[f"{key} {part}"] = round(measured[metric].part(items).score, digits)
    return found


def texts(written, items):
    return [row["output"] for row in written], [item["references"] for item in items]


def compute():
    e2e, e2e_items = rows("fixtures/e2e_test_tgen.jsonl.gz"), rows("e2e/test.jsonl.gz")
    outputs, references = texts(e2e, e2e_items)
    webnlg, webnlg_items = rows("fixtures/webnlg2017_test_bart_large.jsonl.gz"), rows("webnlg2017/test.jsonl.gz")
    dart = rows("fixtures/dart_test_bart_large.jsonl.gz")
    parts = {of: [n for n, row in enumerate(webnlg) if row["seen"] == (of == "seen")] for of in ("seen", "unseen")}
    found = scores("e2e", outputs, references, "e2e", "bleu nist rouge_l cider")
    found |= scores("webnlg", *texts(webnlg, webnlg_items), "webnlg", "bleu bleu_sound", parts)
    found |= scores("dart", *texts(dart, dart), "dart", "bleu bleu_sound")
    # TER is slow: of some items. All of them, and METEOR, are in tests/integrations/test_official_scores.py.
    found |= scores("webnlg 1/10", *texts(webnlg[::10], webnlg_items[::10]), "webnlg", "ter")
    found |= scores("dart 1/20", *texts(dart[::20], dart[::20]), "dart", "ter")
    found |= scores("plain", outputs[:200], references[:200], "plain", "bleu chrf exact_match")
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
    assert found.pop("scores").items() <= golden.pop("scores").items()
    assert found == {name: pytest.approx(values, rel=1e-6) for name, values in golden.items()}
