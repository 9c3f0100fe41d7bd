"""Every metric on cases worked out by hand, the protocols, odd texts, and what is said where something is missing."""

from __future__ import annotations

import math
import os
import shutil
import stat
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prefixtune.evaluation.metrics import Unavailable, measure
from prefixtune.evaluation.metrics.alignment import meteor_statistics
from prefixtune.evaluation.metrics.java import treebank_words
from prefixtune.evaluation.metrics.protocols import PROTOCOLS

needs_java = pytest.mark.skipif(shutil.which("java") is None, reason="there is no java on this machine")
PYTHON_ONLY = ["bleu", "bleu_sound", "nist", "rouge_1", "rouge_2", "chrf", "ter"]
ODD = [
    "two\nlines",
    "a ||| b",
    "|||",
    "",
    "  ",
    "a\u2028b\u2029c",
    "tab\there",
    "a\x85b\x0bc\x0cd\re\x1cf",
    "nul \x00 and \x01",
    "half \ud83d of a pair",
    "snow ☃ and 🚆 £20 café",
    "...",
    "<b>x</b> &amp; [y] (z) 's",
    "EVAL ||| 1",
    "long " * 300,
]


def one(metric: str, hypotheses: list[str], references: list[list[str]], protocol: str = "plain") -> float:
    return measure(hypotheses, references, protocol=protocol, metrics=[metric])[metric].score


# --- by hand ---------------------------------------------------------------------------------------------------------


def test_bleu_of_known_texts():
    # 3 of 4 words, 2 of 3 pairs, 1 of 2 triples, and none of 1, which is smoothed to a half.
    assert one("bleu", ["a b c d"], [["a b c e"]]) == pytest.approx(100 * (3 / 4 * 2 / 3 * 1 / 2 * 1 / 2) ** 0.25)


def test_bleu_of_dart_lets_absent_references_shorten_the_wanted_length():
    long = [["a b c d e f g h i"]]
    # Nine words are wanted; but the two empty texts that the official script sees are nearer to four words.
    assert one("bleu", ["a b c d"], long, "dart") == pytest.approx(100)
    assert one("bleu_sound", ["a b c d"], long, "dart") == pytest.approx(100 * math.exp(1 - 9 / 4))
    assert one("bleu", ["a b c d"], long, "webnlg") == one("bleu_sound", ["a b c d"], long, "webnlg")


def test_nist_of_known_texts():
    # All references: a twice, b and c once; "a b" and "a c" half as often as their beginning "a".
    told_by_words, told_by_pairs = (1 + 2 + 1) / 3, 1 / 1
    ratio = 3 / (4 / 1)
    penalty = math.exp(math.log(0.5) / math.log(1.5) ** 2 * math.log(ratio) ** 2)
    assert one("nist", ["a b", "a"], [["a b"], ["a c"]]) == pytest.approx((told_by_words + told_by_pairs) * penalty)
    # Two references of one item, three words in all: the wanted length is the mean, 1.5 words.
    assert one("nist", ["a"], [["a", "a b"]]) == pytest.approx(
        math.log2(3 / 2) * math.exp(math.log(0.5) / math.log(1.5) ** 2 * math.log(1 / 1.5) ** 2)
    )
    assert one("nist", ["x"], [["a"]]) == 0
    assert one("nist", [""], [["a"]]) == 0


def test_rouge_of_known_texts():
    # Precision 1, recall 2/3; of pairs 1 and 1/2.
    assert one("rouge_1", ["the cat"], [["the cat sat"]]) == pytest.approx(0.8)
    assert one("rouge_2", ["the cat"], [["the cat sat"]]) == pytest.approx(2 / 3)
    assert one("rouge_l", ["the cat"], [["the cat sat"]], "summarization") == pytest.approx(0.8)
    assert one("rouge_l", ["cat the"], [["the cat sat"]], "summarization") == pytest.approx(0.4)
    # Stems count, and of several references the best.
    assert one("rouge_1", ["running cats"], [["x y", "run cat"]]) == 1
    assert one("rouge_1", ["the cat", "dog"], [["the cat"], ["mouse"]]) == 0.5


def test_rouge_is_not_given_for_texts_that_it_cannot_read():
    text = "5 кошек"
    with pytest.raises(Unavailable, match=r"letters a to z and digits alone, and \d+% of the references' are others"):
        measure([text], [[text]], metrics=["rouge_1"])
    left_out: dict[str, str] = {}
    assert list(measure([text], [[text]], metrics=["rouge_l", "chrf"], left_out=left_out)) == ["chrf"]
    assert left_out["rouge_l"].endswith("choose the metric chrf")


def test_ter_of_known_texts():
    # One edit for three words, and one shift for five.
    assert one("ter", ["a x c"], [["a b c"]]) == pytest.approx(1 / 3)
    assert one("ter", ["d e a b c"], [["a b c d e"]]) == pytest.approx(1 / 5)
    # The fewest edits, over the references' mean length; case does not count.
    assert one("ter", ["A B"], [["a b c", "a"]]) == pytest.approx(1 / 2)
    assert one("ter", ["", "a"], [["a b"], ["a b"]]) == pytest.approx(3 / 4)
    # Worse than to write everything anew.
    assert one("ter", ["x y z"], [["a"]]) == 3


def test_chrf_of_known_texts():
    # Half of the characters; no pair of them, no word: the mean of three orders. Longer ones do not occur.
    assert one("chrf", ["ab"], [["ac"]]) == pytest.approx(100 * (1 / 2 + 0 + 0) / 3)


@needs_java
def test_captioning_metrics_of_known_texts():
    references = [["The cat sat.", "the dog"], ["five small red trains"]]
    made = measure(["the cat!", "five small red trains"], references, protocol="e2e", metrics=["rouge_l", "cider"])
    # ROUGE-L: precision 1, recall 2/3 (beta 1.2), and a whole one.
    first = (1 + 1.44) * (2 / 3) / (2 / 3 + 1.44)
    assert made["rouge_l"].score == pytest.approx((first + 1) / 2)
    # CIDEr of a text that is its only reference, with words that no other item has: 10. Two such words reach orders 1
    # and 2 of 4 alone.
    assert measure(["a b", "c d"], [["a b"], ["c d"]], metrics=["cider"])["cider"].score == pytest.approx(5)
    assert measure(["a b c d", "x"], [["a b c d"], ["y"]], metrics=["cider"])["cider"].score == pytest.approx(5)


@needs_java
def test_meteor_of_known_and_odd_texts():
    wanted = [["dog cat sat"], ["red house"], *([text, "x"] for text in ODD)]
    meteor = measure(["cat sat", "red house", *ODD], wanted, metrics=["meteor"])["meteor"]
    # Precision 1, recall 2/3, alpha 0.85; two words in one chunk, gamma 0.6, beta 0.2.
    mean = (2 / 3) / (0.85 + 0.15 * 2 / 3)
    assert meteor.part([0]).score == pytest.approx(mean * (1 - 0.6 * 0.5**0.2))
    assert meteor.part([1]).score == 1
    assert len(meteor.values) == 2 + len(ODD)
    assert 0 < meteor.score < 1
    empty = 2 + ODD.index("")
    assert meteor.part([empty]).score == 0


# --- properties ------------------------------------------------------------------------------------------------------

TEXTS = st.lists(st.text("abcd .,", min_size=1).filter(str.strip), min_size=1, max_size=4)
ITEMS = st.lists(st.tuples(st.text("abcd .,"), TEXTS), min_size=2, max_size=6)


@given(ITEMS, st.randoms())
@settings(deadline=None, max_examples=20)
def test_scores_do_not_depend_on_the_order_of_items_and_references(items: list[tuple[str, list[str]]], random: Any):
    moved = [(text, random.sample(references, len(references))) for text, references in items]
    random.shuffle(moved)
    for protocol in ("plain", "e2e"):
        first, second = (
            measure([text for text, _ in rows], [found for _, found in rows], protocol=protocol, metrics=PYTHON_ONLY)
            for rows in (items, moved)
        )
        for name in PYTHON_ONLY:
            if name != "chrf":  # of equally good references the first gives its counts, in sacrebleu
                assert first[name].score == pytest.approx(second[name].score), name


@pytest.mark.parametrize("protocol", list(PROTOCOLS))
def test_empty_outputs_score_nothing(protocol: str):
    made = measure(["", " "], [["a b c d"], ["e f g h"]], protocol=protocol, metrics=PYTHON_ONLY)
    assert {name: score.score for name, score in made.items()} == {name: int(name == "ter") for name in PYTHON_ONLY}


# --- protocols -------------------------------------------------------------------------------------------------------


def test_case_counts_under_plain_alone():
    cased, small = ["The Mill Is A Pub"], [["the mill is a pub"]]
    assert one("bleu", cased, small) == 0
    for protocol in ("e2e", "webnlg", "dart"):
        assert one("bleu", cased, small, protocol) == pytest.approx(100)


def test_only_three_references_count_in_webnlg_and_dart():
    references = [["x", "y", "z", "a b c d"]]
    assert one("bleu", ["a b c d"], references, "e2e") == pytest.approx(100)
    assert one("bleu", ["a b c d"], references, "webnlg") == 0
    assert one("ter", ["a b c d"], references, "dart") == 4


# --- misuse and what is missing --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("script", "says"),
    [
        ("echo 'no memory' >&2; exit 1", "exit code 1.* for 2: no memory"),
        ("echo bad; echo worse", "METEOR wrote 'bad'"),
    ],
)
def test_a_failing_java_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, says: str):
    program = tmp_path / "java"
    program.write_text(f"#!/bin/sh\ncat >/dev/null\n{script}\n", encoding="utf-8")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    with pytest.raises(Unavailable, match=says):
        meteor_statistics(["a", "b"], [["a"], ["b"]])


@needs_java
def test_the_tokenizer_accepts_any_text_and_writes_no_file():
    package = Path(str(metadata.distribution("pycocoevalcap").locate_file("pycocoevalcap/tokenizer")))
    before = sorted(package.iterdir())
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(treebank_words, [ODD, ODD[::-1]])
    assert first == second[::-1]
    words = dict(zip(ODD, first, strict=True))
    assert words["two\nlines"] == "two lines"
    assert words["a\u2028b\u2029c"] == "a b c"
    assert words["..."] == words[""] == words["  "] == ""
    assert words["snow ☃ and 🚆 £20 café"].endswith("café")
    assert treebank_words(["It isn't Fred's: the pub, near (the) river!"]) == [
        "it is n't fred 's the pub near -lrb- the -rrb- river"
    ]
    assert sorted(package.iterdir()) == before
