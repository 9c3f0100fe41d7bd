"""The official scorers' figures, to the decimals that were published, from the outputs they were published for.

Those of BLEU, NIST, ROUGE-L and CIDEr are in tests/golden/test_scores.py.
"""

import gzip
import json
import shutil
import subprocess

import numpy as np
import pytest

from odd_texts import ODD
from prefixtune.evaluation.metrics import alignment as meteor_module
from prefixtune.evaluation.metrics import measure
from prefixtune.evaluation.metrics.alignment import METEOR_JAR, meteor_score
from prefixtune.evaluation.metrics.java import jar_path

needs_java = pytest.mark.skipif(shutil.which("java") is None, reason="there is no java on this machine")


def lines(folder, name):
    path = folder / name
    if not path.is_file():
        pytest.skip(f"{name} is not on this machine")
    with gzip.open(path, "rt", encoding="utf-8") as handle:
        return [json.loads(line) for line in handle]


@pytest.fixture(scope="module")
def e2e(shared_data):
    outputs, items = lines(shared_data, "fixtures/e2e_test_tgen.jsonl.gz"), lines(shared_data, "e2e/test.jsonl.gz")
    assert [one["mr"] for one in outputs] == [item["mr"] for item in items]
    return [one["output"] for one in outputs], [item["references"] for item in items]


@pytest.fixture(scope="module")
def webnlg(shared_data):
    """Outputs, references as released, and which items are of categories that were seen in training, and unseen."""
    rows = lines(shared_data, "fixtures/webnlg2017_test_bart_large.jsonl.gz")
    items = lines(shared_data, "webnlg2017/test.jsonl.gz")
    parts = [[number for number, row in enumerate(rows) if row["seen"] == seen] for seen in (True, False)]
    assert [len(part) for part in parts] == [971, 891]
    return [row["output"] for row in rows], [item["references"] for item in items], parts


@pytest.fixture(scope="module")
def dart(shared_data):
    rows = lines(shared_data, "fixtures/dart_test_bart_large.jsonl.gz")
    return [row["output"] for row in rows], [row["references"] for row in rows]


def figures(measured, digits, parts=()):
    """The score of the parts and of all, as the paper prints it."""
    return [f"{one.score:.{digits}f}" for one in (*map(measured.part, parts), measured)]


@needs_java
def test_meteor(e2e, webnlg, dart, monkeypatch):
    """Published figures; and what METEOR itself says of odd texts.

    The score of added counts is the one formula that is computed here and not by METEOR. METEOR takes ten seconds to
    start: it counts once for all sets, whose texts are gathered first.
    """
    texts = ["the cat sat on the mat", "cats were sitting on mats", "a dog", "", "the red house is big", "x y z"]
    texts += ["cat sat", *ODD]
    references = [
        ["the cat sat on the mat"],
        ["a cat sat on a mat"],
        ["the hound"],
        ["some"],
        ["a large red home"],
        ["q"],
        ["dog cat sat"],
        *([text, "x"] for text in ODD),
    ]
    sets = {"e2e": e2e, "webnlg": webnlg[:2], "dart": dart, "plain": (texts, references)}
    count, asked = meteor_module.meteor_statistics, []

    def scores(statistics):
        monkeypatch.setattr(meteor_module, "meteor_statistics", statistics)
        return {name: measure(*pair, protocol=name, metrics=["meteor"])["meteor"] for name, pair in sets.items()}

    scores(lambda *pair: asked.extend(zip(*pair, strict=True)) or [[0] * 23] * len(pair[0]))
    counts = count(*zip(*asked, strict=True))
    rows = iter(counts)
    measured = scores(lambda hypotheses, _: [next(rows) for _ in hypotheses])
    assert figures(measured["e2e"], 4) == ["0.4483"]
    assert figures(measured["webnlg"], 3, webnlg[2]) == ["0.458", "0.398", "0.430"]
    assert figures(measured["dart"], 2) == ["0.39"]

    # EVAL takes counts of items, and answers with each one's score and then that of all.
    evaluate = " ||| ".join(["EVAL", *(" ".join(map(str, row)) for row in counts[-len(texts) :])]) + "\n"
    command = ["java", "-Xmx2G", "-jar", str(jar_path(METEOR_JAR)), "-", "-", "-stdio", "-l", "en", "-norm"]
    answer = subprocess.run(command, input=evaluate, capture_output=True, text=True, check=True).stdout.split()
    *each, total = map(float, answer)
    plain = measured["plain"]
    assert [plain.part([number]).score for number in range(len(texts))] == pytest.approx(each, abs=1e-9)
    assert plain.score == pytest.approx(total, abs=1e-9)
    assert each[0] == 1
    # Precision 1, recall 2/3, alpha 0.85; two words in one chunk, gamma 0.6, beta 0.2.
    mean = (2 / 3) / (0.85 + 0.15 * 2 / 3)
    assert each[6] == pytest.approx(mean * (1 - 0.6 * 0.5**0.2))
    assert 0 < total < 1
    assert meteor_score(np.zeros(23)) == 0


def test_ter(webnlg):
    outputs, references, parts = webnlg
    measured = measure(outputs, references, protocol="webnlg", metrics=["ter"])["ter"]
    assert figures(measured, 3, parts) == ["0.323", "0.441", "0.377"]


def test_absent_references_of_dart_are_counted_as_empty_and_this_is_said(dart, shared_data):
    outputs, references = (column[::20] for column in dart)
    measured = measure(outputs, references, protocol="dart", metrics=["bleu", "bleu_sound"])
    assert "absent references counted as empty" in measured["bleu"].implementation
    assert "counted as empty" not in measured["bleu_sound"].implementation
    # From the release's own references, in their spelling, the same figure comes about.
    items = lines(shared_data, "dart/test.jsonl.gz")[::20]
    raw = measure(outputs, [item["references"] for item in items], protocol="dart", metrics=["bleu", "bleu_sound"])
    assert {name: one.score for name, one in raw.items()} == {name: one.score for name, one in measured.items()}


def test_sums_of_rows_give_the_libraries_own_scores(e2e):
    import sacrebleu

    outputs, references = e2e[0][:100], e2e[1][:100]
    streams = [[item[number] if number < len(item) else None for item in references] for number in range(40)]
    streams = [stream for stream in streams if any(stream)]
    measured = measure(outputs, references, metrics=["bleu", "chrf", "ter"])
    assert measured["bleu"].score == pytest.approx(sacrebleu.BLEU().corpus_score(outputs, streams).score)
    assert measured["chrf"].score == pytest.approx(sacrebleu.CHRF(word_order=2).corpus_score(outputs, streams).score)
    fewer = measure(outputs, [item[:1] for item in references], metrics=["ter"])["ter"]
    assert 100 * fewer.score == pytest.approx(sacrebleu.TER().corpus_score(outputs, streams[:1]).score)
