"""`prefixtune score`: its JSON, its tables, and its messages about wrong or missing files."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from command_line import call
from prefixtune.errors import ConfigError, DataError

ITEMS = [
    {"mr": "name[Aromi]", "references": ["Aromi is a pub.", "There is a pub called Aromi."]},
    {"mr": "name[Blue Spice]", "references": ["Blue Spice is near the river."]},
    {"mr": "name[The Mill], near[Aromi]", "references": ["The Mill is near Aromi, a good pub."]},
]
OUTPUTS = ["Aromi is a pub.", "Blue Spice is by the river.", "The Mill is near Aromi."]


def write(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


@pytest.fixture
def references(tmp_path: Path) -> str:
    return write(tmp_path / "test.jsonl", "".join(json.dumps(item) + "\n" for item in ITEMS))


@pytest.fixture
def hypotheses(tmp_path: Path) -> str:
    return write(tmp_path / "outputs.txt", "".join(f"{line}\n" for line in OUTPUTS))


def run(*arguments: str) -> int:
    return call("score", *arguments)


def run_json(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert run(*arguments, "--json") == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_json_agrees_with_the_library(references: str, hypotheses: str, capsys: pytest.CaptureFixture[str]):
    from prefixtune.evaluation.metrics import compute

    result = run_json(
        capsys, "--task", "e2e", "--hypotheses", hypotheses, "--references", references, "--metrics", "nist,bleu,ter"
    )
    wanted = compute(OUTPUTS, [item["references"] for item in ITEMS], protocol="e2e", metrics=["nist", "bleu", "ter"])
    assert result["scores"] == {
        name: {"score": one.score, "implementation": one.implementation, "higher_is_better": one.higher_is_better}
        for name, one in wanted.items()
    }
    assert list(result["scores"]) == ["nist", "bleu", "ter"]
    assert (result["num_examples"], result["task"], result["protocol"]) == (3, "e2e", "e2e")
    assert "left_out" not in result


def as_lines(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def test_outputs_of_another_set_are_refused_by_their_sources(
    references: str, hypotheses: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    sources = ["name : Aromi", "name : Blue Spice", "name : The Mill | near :  Aromi"]
    rows = [{"source": source, "output": output} for source, output in zip(sources, OUTPUTS, strict=True)]
    options = ("--task", "e2e", "--references", references, "--metrics", "bleu", "--hypotheses")
    right = write(tmp_path / "outputs.jsonl", as_lines(rows))
    assert run_json(capsys, *options, right) == run_json(capsys, *options, hypotheses)
    other = write(tmp_path / "other.jsonl", as_lines([rows[0], rows[2], rows[1]]))
    for arguments in ((other,), (right, "--against", other)):
        with pytest.raises(DataError, match=r"other\.jsonl, line 2"):
            run(*options, *arguments)


def test_json_lines_on_standard_input(
    references: str, hypotheses: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    options = ("--task", "e2e", "--references", references, "--metrics", "bleu")
    wanted = run_json(capsys, *options, "--hypotheses", hypotheses)
    monkeypatch.setattr(sys, "stdin", io.StringIO(as_lines([{"output": text} for text in OUTPUTS])))
    assert run_json(capsys, *options, "--hypotheses=-") == wanted
    # As evaluations write them.
    rows = [{"number": number, "output": text} for number, text in enumerate(OUTPUTS)]
    monkeypatch.setattr(sys, "stdin", io.StringIO(as_lines([rows[2], rows[0], rows[1]])))
    assert run_json(capsys, *options, "--hypotheses=-") == wanted


def test_texts_that_are_json_are_texts(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    answers = ['{"food": "pizza"}', '{"food": "soup"}']
    rows = [{"prompt": name, "completion": answer} for name, answer in zip(("a", "b"), answers, strict=True)]
    options = ("--references", write(tmp_path / "rows.jsonl", as_lines(rows)), "--metrics", "exact_match")
    outputs = write(tmp_path / "outputs.txt", "\n".join(answers) + "\n")
    assert run_json(capsys, *options, "--hypotheses", outputs)["scores"]["exact_match"]["score"] == 100


def test_an_empty_output_is_an_empty_line(references: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    outputs = write(tmp_path / "some.txt", "Aromi is a pub.\r\n\n\n")
    result = run_json(capsys, "--task", "e2e", "--hypotheses", outputs, "--references", references, "--metrics", "ter")
    # Nothing to do in the first item; 6 and 8 words to write, of 5 (the mean of 4 and 6), 6 and 8.
    assert result["scores"]["ter"]["score"] == pytest.approx(14 / 19)
    one = write(tmp_path / "one.jsonl", as_lines(ITEMS[1:2]))
    blank = write(tmp_path / "blank.txt", "\n")
    result = run_json(capsys, "--task", "e2e", "--hypotheses", blank, "--references", one, "--metrics", "ter")
    assert result["scores"]["ter"]["score"] == 1, "the only output is empty"


def test_intervals_and_a_second_system(
    references: str, hypotheses: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    other = write(tmp_path / "other.txt", "Something.\nQuite.\nDifferent.\n")
    options = ["--task", "e2e", "--hypotheses", hypotheses, "--references", references, "--metrics", "ter"]
    result = run_json(capsys, *options, "--intervals", "--against", other, "--samples", "200")
    low, high = result["scores"]["ter"]["interval"]
    assert low <= result["scores"]["ter"]["score"] <= high
    against = result["against"]
    assert against["hypotheses"] == other
    assert against["scores"]["ter"]["score"] > result["scores"]["ter"]["score"]
    found = against["comparison"]["ter"]
    assert found["difference"] == result["scores"]["ter"]["score"] - against["scores"]["ter"]["score"]
    assert 0 < found["p_value"] <= 1
    assert found["samples"] == 200
    assert run(*options, "--intervals", "--against", other, "--samples", "200") == 0
    shown = capsys.readouterr().out
    assert "approximate randomization" in shown


def test_the_first_examples_alone_are_scored(
    references: str, hypotheses: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    options = ("--task", "e2e", "--references", references, "--metrics", "ter", "--hypotheses")
    first = write(tmp_path / "first.txt", "".join(f"{line}\n" for line in OUTPUTS[:2]))
    with pytest.raises(DataError, match=r"2 outputs.* 3 examples"):
        run(*options, first)
    found = run_json(capsys, *options, first, "--limit", "2")
    assert found["num_examples"] == 2
    assert found == run_json(capsys, *options, hypotheses, "--limit", "2"), "outputs may also be of all examples"
    assert found["scores"]["ter"] != run_json(capsys, *options, hypotheses, "--limit", "0")["scores"]["ter"]
    with pytest.raises(DataError, match="has 2 outputs"):
        run(*options, first, "--limit", "1")


def test_groups_are_scored_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    rows = [
        {"category": category, "seen": seen, "triples": [["a", "b", "c"]] * size, "references": [text]}
        for category, seen, size, text in (
            ("Food", True, 2, "Bacon is food."),
            ("Artist", False, 1, "She sings."),
            ("Food", True, 1, "Soup is hot."),
        )
    ]
    references = write(tmp_path / "test.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    hypotheses = write(tmp_path / "out.txt", "Bacon is food.\nHe paints.\nSoup is cold.\n")
    options = ["--task", "webnlg", "--hypotheses", hypotheses, "--references", references, "--metrics", "ter"]
    result = run_json(capsys, *options)
    figures = {
        grouping: {group: (found["num_examples"], found["scores"]["ter"]["score"]) for group, found in groups.items()}
        for grouping, groups in result["groups"].items()
    }
    # Words and full stops: one of 8 wrong in Food, two of 3 in Artist.
    assert figures["category"] == {"Food": (2, pytest.approx(1 / 8)), "Artist": (1, pytest.approx(2 / 3))}
    assert figures["seen"] == {"seen": (2, pytest.approx(1 / 8)), "unseen": (1, pytest.approx(2 / 3))}
    assert list(figures["triples"]) == ["1", "2"]
    assert run(*options) == 0
    assert "unseen" in capsys.readouterr().out


def test_without_java_default_metrics_are_left_out_and_asked_ones_refused(
    references: str, hypotheses: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("PATH", "")
    options = ["--task", "e2e", "--hypotheses", hypotheses, "--references", references]
    assert run(*options, "--json") == 0
    out, err = capsys.readouterr()
    result = json.loads(out)
    assert list(result["scores"]) == ["bleu", "nist"]
    assert list(result["left_out"]) == ["meteor", "rouge_l", "cider"]
    assert err == ""
    assert run(*options) == 0
    assert "warning: meteor is left out" in capsys.readouterr().err
    assert run(*options, "--quiet") == 0
    assert capsys.readouterr().err == ""
    with pytest.raises(ConfigError):
        run(*options, "--metrics", "bleu,meteor")


def test_labels_and_tags(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    labels = write(tmp_path / "test.csv", "text,label\nsplendid,good\ndull,bad\nfine,good\n")
    hypotheses = write(tmp_path / "labels.txt", "good\ngood\ngood\n")
    options = ["--task", "classification", "--hypotheses", hypotheses, "--references", labels]
    result = run_json(capsys, *options)
    assert {name: found["score"] for name, found in result["scores"].items()} == {
        "accuracy": pytest.approx(200 / 3),
        "macro_f1": pytest.approx(40),
    }
    assert list(run_json(capsys, *options, "--metrics", "accuracy")["scores"]) == ["accuracy"]
    with pytest.raises(ConfigError):
        run(*options, "--metrics", "bleu")

    rows = [{"tokens": ["to", "Rome", "now"], "tags": ["O", "B-PLACE", "O"]}]
    tags = write(tmp_path / "tags.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    options = ["--task", "tagging", "--references", tags, "--hypotheses"]
    result = run_json(capsys, *options, write(tmp_path / "tags.txt", "O B-PLACE B-TIME\n"))
    assert result["scores"]["span_f1"]["score"] == pytest.approx(200 / 3)
    assert result["scores"]["accuracy"]["score"] == pytest.approx(200 / 3)
    with pytest.raises(DataError):
        run(*options, write(tmp_path / "short.txt", "O\n"))


def test_options_for_texts_are_refused_for_labels(tmp_path: Path):
    labels = write(tmp_path / "labels.jsonl", '{"text": "good", "label": "yes"}\n')
    outputs = write(tmp_path / "outputs.txt", "yes\n")
    with pytest.raises(ConfigError, match="--against"):
        run("--hypotheses", outputs, "--references", labels, "--against", outputs)


def test_outputs_may_be_of_all_entries_also_of_those_without_a_good_text(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    entries = [
        {"category": "Food", "triples": [["a", "r", str(number)]], "references": [text], "comments": [comment]}
        for number, (text, comment) in enumerate((("It is none.", "good"), ("It.", "bad"), ("It is two.", "good")))
    ]
    file = write(tmp_path / "dev.jsonl", "".join(json.dumps(entry) + "\n" for entry in entries))
    options = ("--task", "webnlg", "--references", file, "--metrics", "bleu")
    examples = write(tmp_path / "examples.txt", "it is none\nit is two\n")
    whole = write(tmp_path / "whole.txt", "it is none\nwhatever\nit is two\n")
    first, second = (run_json(capsys, *options, "--hypotheses", name) for name in (examples, whole))
    assert first == second
    assert first["num_examples"] == 2
    assert run(*options, "--hypotheses", whole) == 0
    assert "1 of 3 entries" in capsys.readouterr().err
    other = write(tmp_path / "other.txt", "it is none\n" * 4)
    with pytest.raises(DataError, match=r"4 outputs.* 2 examples"):
        run(*options, "--hypotheses", other)
