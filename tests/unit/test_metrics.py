"""BLEU: the official figure, references of unequal number, and misuse."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from prefixtune.metrics import bleu

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"


def lines(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        pytest.skip(f"{path.name} is not on this machine")
    with gzip.open(path, "rt", encoding="utf-8") as handle:
        return [json.loads(line) for line in handle]


def test_the_official_figure_of_the_e2e_challenge():
    outputs = lines(DATA / "fixtures" / "e2e_test_tgen.jsonl.gz")
    references = lines(DATA / "e2e" / "test.jsonl.gz")
    assert [item["mr"] for item in outputs] == [item["mr"] for item in references]
    score = bleu([item["output"] for item in outputs], [item["references"] for item in references])
    assert f"{score.score:.2f}" == "65.93"


def test_a_score_names_what_made_it():
    import sacrebleu

    score = bleu(["The Mill is a pub near the river."], [["the mill is a pub near the RIVER."]])
    assert (score.name, round(score.score, 6)) == ("BLEU", 100.0)
    assert score.implementation.startswith(f"sacrebleu {sacrebleu.__version__} ")
    assert "case:lc" in score.implementation
    assert "tok:13a" in score.implementation


def test_an_absent_reference_counts_as_absent():
    hypotheses = ["a b c d e f", "g h i j k l"]
    lone = bleu(hypotheses, [["a b c d e f"], ["g h i j k x"]]).score
    assert lone < 100
    # A second reference for one item alone, or a blank one, must not change how the other item is measured.
    assert bleu(hypotheses, [["a b c d e f"], ["g h i j k x", " "]]).score == lone
    assert bleu(hypotheses, [["z", "a b c d e f"], ["g h i j k x"]]).score == lone
    assert bleu(hypotheses, [["a b c d e f"], ["g h i j k x", "g h i j k l"]]).score == pytest.approx(100)


def test_an_empty_hypothesis_scores_nothing():
    assert bleu([""], [["a b c d"]]).score == 0


@pytest.mark.parametrize(
    ("hypotheses", "references", "says"),
    [
        ([], [], "no hypothesis"),
        (["a"], [], "1 hypotheses but references for 0 items"),
        (["a"], [["a"], ["b"]], "1 hypotheses but references for 2 items"),
        (["a", "b"], [["a"], []], "item 1 .* has no reference"),
        (["a"], [[" "]], "item 0 .* has no reference"),
        (["a"], ["a"], "list of lists"),
        ("a", [["a"]], "list of strings"),
    ],
)
def test_misuse_is_told(hypotheses: Any, references: Any, says: str):
    with pytest.raises(ValueError, match=says):
        bleu(hypotheses, references)


def test_importing_loads_no_scorer():
    code = "import sys, prefixtune.metrics; sys.exit('sacrebleu' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
